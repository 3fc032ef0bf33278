"""Python client of the control plane: one method per route, answers as the models of ``api.schemas``.

    with Client("http://127.0.0.1:8080") as client:
        client.create_dataset("news")
        version, created = client.push_version("news", Path("2024.ndjson.zst"))
        for event in client.follow():
            ...

Lists are iterators over all pages. An answer other than success raises ApiError; an unreachable server raises
httpx.TransportError.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from api.schemas.costs import Costs
from api.schemas.data import Dataset, DataVersion, Excluded, Slice
from api.schemas.events import Event, Health
from api.schemas.models import Checkpoint, Forgetting, Model, ModelVersion
from api.schemas.releases import Release, ServingStatus
from api.schemas.updates import MetricPoint, Metrics, Update
from api.transport import ApiError, HttpTransport, ProgressCallback, UploadResult, url_path, without_none
from service.ingest.formats import ContentEncoding, DataFormat

__all__ = ["ApiError", "Client", "ContentEncoding", "DataFormat", "ProgressCallback", "UploadResult"]


class Client:
    """A connection to the control plane at ``url``, its root. Usable as a context manager."""

    def __init__(self, url: str = "http://127.0.0.1:8080", *, timeout: float = 30.0) -> None:
        self._http = HttpTransport(url, timeout)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- data ---

    def create_dataset(
        self, name: str, *, description: str | None = None, holdout_fraction: float | None = None
    ) -> Dataset:
        body = {"name": name, "description": description, "holdout_fraction": holdout_fraction}
        return self._http.request("POST", "/datasets", Dataset, json=without_none(body))

    def datasets(self) -> Iterator[Dataset]:
        return self._http.paginate("/datasets", Dataset)

    def dataset(self, name: str) -> Dataset:
        return self._http.request("GET", url_path("datasets", name), Dataset)

    def push_version(
        self,
        dataset: str,
        source: Path | Iterable[bytes],
        *,
        format: DataFormat | None = None,
        encoding: ContentEncoding | None = None,
        label: str | None = None,
        progress: ProgressCallback | None = None,
    ) -> UploadResult[DataVersion]:
        """Stream a file, or chunks of bytes, as the next data version.

        A file's suffixes give its format and encoding (``news.ndjson.zst``); chunks need ``format``. Raises
        InvalidRequest if the format is unknown.
        """
        path = url_path("datasets", dataset, "versions")
        return self._http.upload(path, DataVersion, source, format, encoding, progress, label=label)

    def import_version(
        self, dataset: str, uri: str, *, format: DataFormat | None = None, label: str | None = None
    ) -> UploadResult[DataVersion]:
        """Have the service itself read ``uri`` as the next data version."""
        body = without_none({"uri": uri, "format": format, "label": label})
        return self._http.upload_from_uri(url_path("datasets", dataset, "versions"), DataVersion, body)

    def data_versions(self, dataset: str) -> Iterator[DataVersion]:
        return self._http.paginate(url_path("datasets", dataset, "versions"), DataVersion)

    def data_version(self, dataset: str, number: int) -> DataVersion:
        return self._http.request("GET", url_path("datasets", dataset, "versions", number), DataVersion)

    def exclude_version(self, dataset: str, number: int, reason: str) -> Excluded:
        """Exclude a data version from all training; models rewind to before it at their next update."""
        path = url_path("datasets", dataset, "versions", number, "exclude")
        return self._http.request("POST", path, Excluded, json={"reason": reason})

    def push_slice(
        self,
        dataset: str,
        name: str,
        source: Path | Iterable[bytes],
        *,
        data_version: int | None = None,
        format: DataFormat | None = None,
        encoding: ContentEncoding | None = None,
        progress: ProgressCallback | None = None,
    ) -> UploadResult[Slice]:
        """Stream an evaluation set; it takes the same arguments as ``push_version``."""
        path = url_path("datasets", dataset, "slices")
        query = {"name": name, "data_version": data_version}
        return self._http.upload(path, Slice, source, format, encoding, progress, **query)

    def slices(self, dataset: str) -> Iterator[Slice]:
        return self._http.paginate(url_path("datasets", dataset, "slices"), Slice)

    # --- models ---

    def create_model(self, spec: Mapping[str, Any]) -> Model:
        """Create a model.

        ``spec`` is the request body: ``name``, ``dataset``, and whatever differs from the defaults.
        """
        return self._http.request("POST", "/models", Model, json=spec)

    def change_model(self, name: str, changes: Mapping[str, Any]) -> Model:
        return self._http.request("PATCH", url_path("models", name), Model, json=changes)

    def models(self) -> Iterator[Model]:
        return self._http.paginate("/models", Model)

    def model(self, name: str) -> Model:
        return self._http.request("GET", url_path("models", name), Model)

    def model_versions(self, model: str) -> Iterator[ModelVersion]:
        return self._http.paginate(url_path("models", model, "versions"), ModelVersion)

    def model_version(self, model: str, number: int | str) -> ModelVersion:
        """Show a version. ``number`` may also be ``latest`` or ``served``."""
        return self._http.request("GET", url_path("models", model, "versions", number), ModelVersion)

    def download(self, model: str, number: int | str, file: str, target: Path) -> None:
        """Write one file of a version's export to ``target``."""
        folder = url_path("models", model, "versions", number, "files")
        self._http.download(f"{folder}/{quote(file)}", target)

    def checkpoints(self, model: str) -> Iterator[Checkpoint]:
        return self._http.paginate(url_path("models", model, "checkpoints"), Checkpoint)

    def forgetting(self, model: str) -> Forgetting:
        return self._http.request("GET", url_path("models", model, "forgetting"), Forgetting)

    def costs(self, model: str, *, tokens: int | None = None) -> Costs:
        """Show costs.

        ``tokens`` is the size of the next version for the forecast, by default the size of the last one.
        """
        return self._http.request("GET", url_path("models", model, "costs"), Costs, tokens=tokens)

    # --- updates and releases ---

    def start_update(
        self,
        model: str,
        *,
        data_version: int | None = None,
        branch_from: str | None = None,
        decay: Mapping[str, Any] | None = None,
        paradigm: Mapping[str, Any] | None = None,
    ) -> Update:
        """Start the line's next update, a branch from a checkpoint, or a one-off under another paradigm."""
        body = without_none(
            {"data_version": data_version, "branch_from": branch_from, "decay": decay, "paradigm": paradigm}
        )
        return self._http.request("POST", url_path("models", model, "updates"), Update, json=body)

    def updates(self, model: str) -> Iterator[Update]:
        return self._http.paginate(url_path("models", model, "updates"), Update)

    def update(self, update_id: str) -> Update:
        return self._http.request("GET", url_path("updates", update_id), Update)

    def cancel_update(self, update_id: str) -> Update:
        return self._http.request("POST", url_path("updates", update_id, "cancel"), Update)

    def retry_update(self, update_id: str) -> Update:
        return self._http.request("POST", url_path("updates", update_id, "retry"), Update)

    def metrics(self, update_id: str, stage_id: str) -> list[MetricPoint]:
        return self._http.request(
            "GET", url_path("updates", update_id, "metrics"), Metrics, stage=stage_id
        ).data

    def release(
        self,
        model: str,
        version: int | str,
        *,
        reason: str | None = None,
        rollout: Mapping[str, Any] | None = None,
    ) -> Release:
        """Request that a version be served.

        ``previous`` is the version that was served before the current one.
        """
        body = without_none({"version": version, "reason": reason, "rollout": rollout})
        return self._http.request("POST", url_path("models", model, "releases"), Release, json=body)

    def releases(self, model: str) -> Iterator[Release]:
        return self._http.paginate(url_path("models", model, "releases"), Release)

    def serving(self, model: str) -> ServingStatus:
        """Show the version that should be served, and what each replica last reported."""
        return self._http.request("GET", url_path("models", model, "serving"), ServingStatus)

    # --- events and health ---

    def events(self, after: str | None = None) -> Iterator[Event]:
        """List past events: all of them, or those after the event with id ``after``."""
        return self._http.paginate("/events", Event, after)

    def follow(self, after: str = "latest") -> Iterator[Event]:
        """Yield events as they happen, forever. Starts now, or after the event with id ``after``.

        Once connected, it reconnects after every interruption without losing events.
        """
        return self._http.stream_events("/events", after)

    def ready(self) -> Health:
        """Check that the service is ready. Raises ApiError that names the parts that are not."""
        return self._http.request("GET", "/readyz", Health, base="")
