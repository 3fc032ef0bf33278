"""Model versions: list them, show one, and download its export."""

import re
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse
from sqlalchemy.orm import Session

from api.deps import PageDep, ServicesDep
from api.schemas.common import Page
from api.schemas.models import Artifact, BranchPoint, ModelVersion
from service.artifacts import Artifacts
from service.core.errors import ArtifactMissing, NotFound
from service.core.manifest import Manifest
from service.store import models, tables

router = APIRouter(tags=["models"])

_NUMBER = re.compile(r"[1-9][0-9]{0,8}|latest|served")
_FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": _FILE},
    206: {"description": "The requested range of the file", "content": _FILE},
    416: {"description": "The file has no such range", "content": {"text/plain": {}}},
}


@router.get("/models/{model}/versions")
def list_model_versions(model: str, services: ServicesDep, page: PageDep) -> Page[ModelVersion]:
    """List the versions of a model."""
    with services.database.reading() as session:
        row = models.model(session, model)
        rows, has_more = models.page_of_versions(session, row.id, page.after, page.limit)
    return Page(data=[_document(services.artifacts, model, row) for row in rows], has_more=has_more)


@router.get("/models/{model}/versions/{number}")
def show_model_version(model: str, number: str, services: ServicesDep) -> ModelVersion:
    """Show a version of a model by its number, or the ``latest`` or ``served`` one."""
    with services.database.reading() as session:
        row = _version(session, model, number)
    return _document(services.artifacts, model, row)


@router.head("/models/{model}/versions/{number}/files/{path:path}", include_in_schema=False)
@router.get(
    "/models/{model}/versions/{number}/files/{path:path}",
    response_class=FileResponse,
    responses=_FILE_RESPONSES,
)
def download_file(model: str, number: str, path: str, services: ServicesDep) -> FileResponse:
    """Download a file of the export, whole or in ranges. Its ETag is its sha256."""
    with services.database.reading() as session:
        row = _version(session, model, number)
    manifest = _manifest(services.artifacts, row.export_key)
    # Only file names in the manifest become paths, so that no request can leave the folder.
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
        raise ArtifactMissing(f"the artifact {key} is missing from the store")
    return manifest


def _document(artifacts: Artifacts, model: str, row: tables.ModelVersion) -> ModelVersion:
    manifest = _manifest(artifacts, row.export_key)
    return ModelVersion.from_row(
        row,
        model=model,
        update=row.update_id,
        branch_point=BranchPoint(checkpoint=row.checkpoint_id, step=row.branch_point),
        artifact=Artifact.from_row(manifest, path=artifacts.location(manifest)),
    )
