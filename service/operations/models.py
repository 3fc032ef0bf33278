"""Create a model line, copying what it is made from into the artifacts, and change what may change in its life."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.errors import Conflict, ErrorItem, InvalidRequest, Unavailable
from service.core.specs import ModelSpec
from service.store import datasets, events, models, updates
from service.store.database import Database, now
from service.store.in_use import share_artifacts
from service.store.tables import Model

BASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
CHANGEABLE = frozenset({"gate", "serving", "auto_update", "auto_release"})
CHANGEABLE_TRAINING = frozenset({"workers", "strategy"})


def create_model(
    database: Database, artifacts: Artifacts, import_roots: Sequence[Path], spec: ModelSpec
) -> Model:
    """Write the model and, where its dataset has data and it updates by itself, its first update to the newest version.

    Raises NotFound for an unknown dataset, Conflict for a taken name, InvalidRequest for a base or tokenizer that
    cannot be taken over.
    """
    base_key = _take_base(artifacts, import_roots, spec.architecture.base) if spec.architecture.base else None
    tokenizer_key = None
    if spec.tokenizer and spec.tokenizer.path:
        tokenizer_key = _take_tokenizer(artifacts, import_roots, spec.tokenizer.path)
    try:
        with database.transaction() as session:
            # Locked, so that a data version registered at this moment is either seen here or sees the model.
            dataset = datasets.dataset(session, spec.dataset, lock=True)
            row = Model(
                name=spec.name,
                dataset_id=dataset.id,
                spec=spec.model_dump(mode="json"),
                base_key=base_key,
                tokenizer_source_key=tokenizer_key,
                created_at=now(session),
            )
            _require_published(session, artifacts, [key for key in (base_key, tokenizer_key) if key])
            session.add(row)
            session.flush()
            events.append(session, "model.created", model=row.name, dataset=dataset.name)
            newest = datasets.newest_version(session, dataset.id)
            if newest is not None and spec.auto_update:
                updates.add(session, row, newest)
    except IntegrityError as error:
        raise Conflict(f"the name {spec.name!r} is taken") from error
    return row


def change_model(database: Database, name: str, changes: dict[str, Any]) -> Model:
    """Change gate, serving, auto_update, auto_release, training.workers and training.strategy. Anything else is a Conflict."""
    fixed = [key for key in changes if key not in CHANGEABLE | {"training"}]
    fixed += [f"training.{key}" for key in changes.get("training") or {} if key not in CHANGEABLE_TRAINING]
    if fixed:
        raise Conflict(f"fixed for the life of a model: {', '.join(fixed)}")
    with database.transaction() as session:
        row = models.model(session, name, lock=True)
        merged = dict(row.spec)
        for key, value in changes.items():
            merged[key] = _changed(merged.get(key), value)
        try:
            row.spec = ModelSpec.model_validate(merged).model_dump(mode="json")
        except ValidationError as error:
            raise InvalidRequest("not a valid model", error_items(error)) from error
        session.flush()
        events.append(session, "model.changed", model=row.name, changes=changes)
    return row


def _changed(before: Any, change: Any) -> Any:
    """An object with the fields that a change names, theirs in turn; a rollout of another strategy is another object."""
    if not isinstance(before, dict) or not isinstance(change, dict):
        return change
    if change.get("strategy", before.get("strategy")) != before.get("strategy"):
        return change
    return before | {key: _changed(before.get(key), value) for key, value in change.items()}


def error_items(error: ValidationError) -> list[ErrorItem]:
    """pydantic's findings as ours."""
    return [ErrorItem(".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]


def _take_base(artifacts: Artifacts, import_roots: Sequence[Path], given: str) -> str:
    """Copy a base checkpoint: its config, its safetensors, its tokenizer. Nothing that could be code or a pickle."""
    folder = allowed_path(import_roots, given)
    if not folder.is_dir():
        raise InvalidRequest(f"{given!r} is not a folder")
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if not weights:
        hint = f"; {pickles[0].name} is a pickle, which is never read" if pickles else ""
        raise InvalidRequest(f"{given!r} holds no *.safetensors{hint}")
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise InvalidRequest(f"{given!r} holds no {' and no '.join(missing)}")
    others = [folder / name for name in BASE_FILES if (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    return _publish_copy(artifacts, "base", [*others, *weights, *([index] if index.is_file() else [])])


def _take_tokenizer(artifacts: Artifacts, import_roots: Sequence[Path], given: str) -> str:
    path = allowed_path(import_roots, given)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file() or path.name != "tokenizer.json":
        raise InvalidRequest(f"{given!r} is neither a tokenizer.json nor a folder that holds one")
    return _publish_copy(artifacts, "tokenizer-source", [path])


def allowed_path(import_roots: Sequence[Path], given: str) -> Path:
    """The real path behind ``given``, if it lies under an import root. Raises InvalidRequest."""
    path = Path(given).resolve()
    if not any(path.is_relative_to(root.resolve()) for root in import_roots):
        raise InvalidRequest(f"{given!r} is not under PATHSWITCH_IMPORT_ROOTS")
    return path


def _require_published(session: Session, artifacts: Artifacts, keys: Sequence[str]) -> None:
    """A copy that was made before may be old enough to have been collected since it was found."""
    share_artifacts(session)
    for key in keys:
        if artifacts.manifest(key) is None:
            raise Unavailable(f"{key} was removed meanwhile: try again")


def _publish_copy(artifacts: Artifacts, kind: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    key = f"{kind}/{digest.hexdigest()[:32]}"
    if artifacts.manifest(key) is None:
        with artifacts.writing(key) as directory:
            for path in files:
                shutil.copyfile(path, directory / path.name)
            artifacts.publish(key, directory, {})
    return key
