"""Model versions: list, show, and download their exports."""

import re
from collections.abc import Sequence

from fastapi import APIRouter
from fastapi.responses import FileResponse
from sqlalchemy.orm import Session

from api.deps import PlaceHere, ServicesHere
from api.schemas.common import Page
from api.schemas.models import (
    Artifact,
    ArtifactFile,
    BranchPoint,
    Cost,
    Evaluation,
    ModelVersion,
    Verdict,
)
from service.artifacts import Artifacts
from service.core.errors import ArtifactMissing, NotFound
from service.core.manifest import Manifest
from service.store import models, tables

router = APIRouter(tags=["models"])

_NUMBER = re.compile(r"[1-9][0-9]{0,8}|latest|served")


@router.get("/models/{model}/versions")
def list_model_versions(model: str, services: ServicesHere, place: PlaceHere) -> Page[ModelVersion]:
    with services.database.reading() as session:
        row = models.model(session, model)
        rows, has_more = models.page_of_versions(session, row.id, place.after, place.limit)
    return Page(data=[_document(services.artifacts, model, row) for row in rows], has_more=has_more)


@router.get("/models/{model}/versions/{number}")
def show_model_version(model: str, number: str, services: ServicesHere) -> ModelVersion:
    """``number`` may be ``latest`` or ``served``."""
    with services.database.reading() as session:
        row = _version(session, model, number)
    return _document(services.artifacts, model, row)


@router.head("/models/{model}/versions/{number}/files/{path:path}", include_in_schema=False)
@router.get("/models/{model}/versions/{number}/files/{path:path}", response_class=FileResponse)
def download_file(model: str, number: str, path: str, services: ServicesHere) -> FileResponse:
    """One file of the exported folder, whole or in ranges. Its ETag is its sha256."""
    with services.database.reading() as session:
        row = _version(session, model, number)
    manifest = _manifest(services.artifacts, row.export_key)
    # Only names that the manifest has are ever made into paths, so that none can lead out of the folder.
    entry = next((file for file in manifest.files if file.path == path), None)
    if entry is None:
        raise NotFound(f"the export of {model}@{row.number} has no file {path!r}")
    return FileResponse(services.artifacts.path(manifest, entry.path), headers={"etag": f'"{entry.sha256}"'})


def _version(session: Session, model: str, number: str) -> tables.ModelVersion:
    row = models.model(session, model)
    if not _NUMBER.fullmatch(number):
        raise NotFound(f"no model version {number!r}")
    return models.version(session, row.id, number)


def _manifest(artifacts: Artifacts, key: str) -> Manifest:
    manifest = artifacts.manifest(key)
    if manifest is None:
        raise ArtifactMissing(f"{key}: no such artifact")
    return manifest


def _document(artifacts: Artifacts, model: str, row: tables.ModelVersion) -> ModelVersion:
    return ModelVersion(
        id=row.id,
        model=model,
        number=row.number,
        data_version=row.data_version,
        state=row.state,
        update=row.update_id,
        branch_point=BranchPoint(checkpoint=row.checkpoint_id, step=row.branch_point),
        final_step=row.final_step,
        parameters=row.parameters,
        evaluations=[Evaluation.model_validate(item) for item in row.evaluations],
        gate=Verdict.model_validate(row.gate) if row.gate else None,
        cost=Cost.model_validate(row.cost),
        artifact=_artifact(artifacts, row.export_key),
        created_at=row.created_at,
    )


def _artifact(artifacts: Artifacts, key: str) -> Artifact:
    manifest = _manifest(artifacts, key)
    files: Sequence[ArtifactFile] = [
        ArtifactFile(path=file.path, sha256=file.sha256, bytes=file.bytes) for file in manifest.files
    ]
    return Artifact(path=artifacts.location(manifest), sha256=manifest.sha256, files=list(files))
