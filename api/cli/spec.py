"""The body of a new model, from options: what is not given is the service's default."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from api.cli.errors import CliError


def spec_of_file(path: Path) -> dict[str, Any]:
    """A whole body, as `POST /models` takes it."""
    return _json_object(path)


def spec_of_options(
    name: str, dataset: str, preset: str | None, config: Path | None, base: Path | None
) -> dict[str, Any]:
    given: list[dict[str, Any]] = []
    if preset is not None:
        given.append({"preset": preset})
    if config is not None:
        given.append({"config": _json_object(config)})
    if base is not None:
        given.append({"base": str(base.absolute())})
    if len(given) > 1:
        raise CliError("give one of --preset, --config and --base")
    spec: dict[str, Any] = {"name": name, "dataset": dataset}
    return spec | {"architecture": given[0]} if given else spec


def with_settings(spec: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The spec with every `training.peak_lr=1e-3` of the assignments in it. The later of two wins."""
    spec = json.loads(json.dumps(spec))
    for assignment in assignments:
        path, equals, written = assignment.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise CliError(f"--set {assignment}: expected <field>.<field>=<value>")
        place = spec
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise CliError(f"--set {assignment}: {key} is a value, not an object with fields")
        place[keys[-1]] = _value(written)
    return spec


def _value(written: str) -> Any:
    """JSON where it is JSON, a number as people write it (``2e-3``), else the text itself."""
    try:
        return json.loads(written)
    except json.JSONDecodeError:
        return written


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CliError(f"{path} is not JSON", str(error)) from error
    if not isinstance(content, dict):
        raise CliError(f"{path} is not a JSON object")
    return content
