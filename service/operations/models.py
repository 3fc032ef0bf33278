"""Creates models, copying base checkpoints and tokenizers into the artifacts, and changes their mutable fields."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.artifact_files import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from service.core.errors import Conflict, ErrorItem, InvalidRequest, Unavailable
from service.core.specs import ModelSpec
from service.ingest.import_roots import resolve_under_roots
from service.store import datasets, events, models, updates
from service.store.database import Database, now
from service.store.in_use import share_artifacts
from service.store.tables import Model

BASE_FILES = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG)
CHANGEABLE = frozenset({"gate", "serving", "auto_update", "auto_release"})
CHANGEABLE_TRAINING = frozenset({"workers", "strategy"})


def create_model(
    database: Database, artifacts: Artifacts, import_roots: Sequence[Path], spec: ModelSpec
) -> Model:
    """Write a model and, with ``auto_update`` on a dataset that has data, its first update to the newest data version.

    Raises NotFound for an unknown dataset, Conflict for a taken name, InvalidRequest for an unusable base or tokenizer.
    """
    base_key = _copy_base(artifacts, import_roots, spec.architecture.base) if spec.architecture.base else None
    tokenizer_key = None
    if spec.tokenizer and spec.tokenizer.path:
        tokenizer_key = _copy_tokenizer(artifacts, import_roots, spec.tokenizer.path)
    try:
        with database.transaction() as session:
            # With the lock, a concurrent registration either is seen here or sees the model.
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
        raise Conflict(f"a model named {spec.name!r} already exists: choose another name") from error
    return row


def change_model(database: Database, name: str, changes: dict[str, Any]) -> Model:
    """Change gate, serving, auto_update, auto_release, training.workers or training.strategy; any other field is a Conflict."""
    fixed = [key for key in changes if key not in CHANGEABLE | {"training"}]
    fixed += [f"training.{key}" for key in changes.get("training") or {} if key not in CHANGEABLE_TRAINING]
    if fixed:
        raise Conflict(f"these fields cannot change after a model is created: {', '.join(fixed)}")
    with database.transaction() as session:
        row = models.model(session, name, lock=True)
        merged = dict(row.spec)
        for key, value in changes.items():
            merged[key] = _merged(merged.get(key), value)
        try:
            row.spec = ModelSpec.model_validate(merged).model_dump(mode="json")
        except ValidationError as error:
            raise InvalidRequest("the changed model would be invalid", error_items(error)) from error
        session.flush()
        events.append(session, "model.changed", model=row.name, changes=changes)
    return row


def _merged(current: Any, change: Any) -> Any:
    """Merge a change into nested objects. A rollout of another strategy replaces the whole object."""
    if not isinstance(current, dict) or not isinstance(change, dict):
        return change
    if change.get("strategy", current.get("strategy")) != current.get("strategy"):
        return change
    return current | {key: _merged(current.get(key), value) for key, value in change.items()}


def error_items(error: ValidationError) -> list[ErrorItem]:
    """Convert the errors of a pydantic ValidationError."""
    return [ErrorItem(".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]


def _copy_base(artifacts: Artifacts, import_roots: Sequence[Path], path: str) -> str:
    """Copy config, safetensors and tokenizer of a base checkpoint; never a file that could hold code or a pickle."""
    folder = resolve_under_roots(path, import_roots)
    if folder is None or not folder.is_dir():
        raise InvalidRequest(f"architecture.base: {path!r} is not a folder under PATHSWITCH_IMPORT_ROOTS")
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if not weights:
        hint = f": convert {pickles[0].name}, a pickle, to safetensors" if pickles else ""
        raise InvalidRequest(f"architecture.base: {path!r} has no *.safetensors{hint}")
    missing = [name for name in (CONFIG, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise InvalidRequest(f"architecture.base: {path!r} has no {' and no '.join(missing)}")
    others = [folder / name for name in BASE_FILES if (folder / name).is_file()]
    index = folder / f"{WEIGHTS}.index.json"
    return _publish_copy(artifacts, "base", [*others, *weights, *([index] if index.is_file() else [])])


def _copy_tokenizer(artifacts: Artifacts, import_roots: Sequence[Path], path: str) -> str:
    file = resolve_under_roots(path, import_roots)
    if file is not None and file.is_dir():
        file = file / TOKENIZER
    if file is None or not file.is_file() or file.name != TOKENIZER:
        raise InvalidRequest(
            f"tokenizer.path: {path!r} is neither a {TOKENIZER} nor a folder with one, "
            "under PATHSWITCH_IMPORT_ROOTS"
        )
    return _publish_copy(artifacts, "tokenizer-source", [file])


def _require_published(session: Session, artifacts: Artifacts, keys: Sequence[str]) -> None:
    """Raise Unavailable if garbage collection removed a copy, made earlier, since it was found."""
    share_artifacts(session)
    for key in keys:
        if artifacts.manifest(key) is None:
            raise Unavailable(f"garbage collection has just removed {key}: try again")


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
