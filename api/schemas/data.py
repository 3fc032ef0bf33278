"""Datasets, their data versions and their given slices."""

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.common import Document, Request, Text, Time
from service.core.specs import Name
from service.core.states import ModelVersionState
from service.ingest.formats import DataFormat


class NewDataset(Request):
    name: Name
    description: Text | None = None
    holdout_fraction: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.02


class Dataset(Document):
    id: str
    name: str
    description: str | None
    holdout_fraction: float
    latest_version: int | None
    created_at: Time


class Source(Request):
    """A body that is named instead of sent. Without ``format``, the suffixes of the name tell it."""

    uri: Text
    format: DataFormat | None = None


class LabelledSource(Source):
    label: Text | None = None


class DataVersion(Document):
    """``sha256`` and ``bytes`` are of the decoded body; ``updates`` train it. No plan reads an ``excluded`` one."""

    id: str
    dataset: str
    number: int
    label: str | None
    state: Literal["ready", "excluded"]
    excluded_at: Time | None
    excluded_reason: str | None
    sha256: str
    bytes: int
    documents: int
    duplicates: int
    holdout_documents: int
    created_at: Time
    updates: list[str]


class Slice(Document):
    """A given evaluation set. ``data_version``: the first whose updates are measured on it; None for all."""

    id: str
    dataset: str
    name: str
    data_version: int | None
    documents: int
    created_at: Time


class Exclusion(Request):
    reason: Text


class AffectedVersion(Document):
    """A model version that has read the excluded data."""

    model: str
    number: int
    state: ModelVersionState


class Excluded(Document):
    """What has read it stays as it is; the models rewind to before it at their next update."""

    affected_versions: list[AffectedVersion]
