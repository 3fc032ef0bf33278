"""Builds the body of `POST /models` from options. Fields that no option sets keep the service's defaults."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from api.cli.errors import CliError


def spec_of_file(path: Path) -> dict[str, Any]:
    """Read a complete body from a JSON file."""
    return _json_object(path)


def spec_of_options(
    name: str, dataset: str, preset: str | None, config: Path | None, base: Path | None
) -> dict[str, Any]:
    """A body with the given names and at most one kind of architecture."""
    architectures: list[dict[str, Any]] = []
    if preset is not None:
        architectures.append({"preset": preset})
    if config is not None:
        architectures.append({"config": _json_object(config)})
    if base is not None:
        architectures.append({"base": str(base.absolute())})
    if len(architectures) > 1:
        raise CliError("give only one of --preset, --config and --base")
    spec: dict[str, Any] = {"name": name, "dataset": dataset}
    return spec | {"architecture": architectures[0]} if architectures else spec


def with_settings(spec: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of the spec with assignments such as `training.peak_lr=1e-3` applied in order."""
    spec = json.loads(json.dumps(spec))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise CliError(f"--set {assignment}: expected FIELD=VALUE, such as training.peak_lr=1e-3")
        target = spec
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise CliError(f"--set {assignment}: {key} has a value and no fields")
        target[keys[-1]] = _parse_value(text)
    return spec


def _parse_value(text: str) -> Any:
    """The text as JSON if it is valid JSON, such as ``2e-3`` or ``true``; otherwise the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CliError(f"{path} is not valid JSON", str(error)) from error
    if not isinstance(content, dict):
        raise CliError(f"{path} is not a JSON object")
    return content
