"""Datasets, data versions and slices."""

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.common import RequestModel, ResponseModel, Text, Time
from service.core.specs import Name
from service.core.states import ModelVersionState
from service.ingest.formats import DataFormat


class NewDataset(RequestModel):
    name: Name
    description: Text | None = None
    holdout_fraction: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.02


class Dataset(ResponseModel):
    id: str
    name: str
    description: str | None
    holdout_fraction: float
    latest_version: int | None
    created_at: Time


class Source(RequestModel):
    """Names data for the service to read. By default, the suffixes of ``uri`` give the format."""

    uri: Text
    format: DataFormat | None = None


class LabelledSource(Source):
    label: Text | None = None


class DataVersion(ResponseModel):
    """A data version.

    ``sha256`` and ``bytes`` describe the decoded body; ``updates`` are ids of updates that train it.
    """

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


class Slice(ResponseModel):
    """An uploaded evaluation set.

    It measures updates to ``data_version`` and later ones, or all updates if that is None.
    """

    id: str
    dataset: str
    name: str
    data_version: int | None
    documents: int
    created_at: Time


class Exclusion(RequestModel):
    reason: Text


class AffectedVersion(ResponseModel):
    """A model version that was trained on the excluded data."""

    model: str
    number: int
    state: ModelVersionState


class Excluded(ResponseModel):
    """The model versions trained on the data.

    They stay; the models rewind to before the data at their next update.
    """

    affected_versions: list[AffectedVersion]
