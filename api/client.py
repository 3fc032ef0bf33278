"""The control plane from Python: one method a route, answers as the documents of ``api.schemas``.

    with Client("http://127.0.0.1:8080") as client:
        client.create_dataset("news")
        version, created = client.push_version("news", Path("2024.ndjson.zst"))
        for event in client.follow():
            ...

Lists are iterators over all pages. Whatever is not answered with success raises ApiError, and where nobody
answers, httpx.TransportError.
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
from api.schemas.releases import Release, Serving
from api.schemas.updates import MetricPoint, Metrics, Update
from api.wire import ApiError, Progress, Pushed, Wire, given, url_path
from service.ingest.formats import ContentEncoding, DataFormat

__all__ = ["ApiError", "Client", "ContentEncoding", "DataFormat", "Progress", "Pushed"]


class Client:
    """``url`` is the root of the control plane. Usable as a context manager."""

    def __init__(self, url: str = "http://127.0.0.1:8080", *, timeout: float = 30.0) -> None:
        self._wire = Wire(url, timeout)

    def close(self) -> None:
        self._wire.close()

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
        return self._wire.ask("POST", "/datasets", Dataset, json=given(body))

    def datasets(self) -> Iterator[Dataset]:
        return self._wire.every("/datasets", Dataset)

    def dataset(self, name: str) -> Dataset:
        return self._wire.ask("GET", url_path("datasets", name), Dataset)

    def push_version(
        self,
        dataset: str,
        source: Path | Iterable[bytes],
        *,
        format: DataFormat | None = None,
        encoding: ContentEncoding | None = None,
        label: str | None = None,
        progress: Progress | None = None,
    ) -> Pushed[DataVersion]:
        """Stream a file, or chunks of bytes, as the next data version.

        The suffixes of a file tell its format and encoding (``news.ndjson.zst``); of chunks the format must
        be said. Raises InvalidRequest where it cannot be told.
        """
        path = url_path("datasets", dataset, "versions")
        return self._wire.push(path, DataVersion, source, format, encoding, progress, label=label)

    def import_version(
        self, dataset: str, uri: str, *, format: DataFormat | None = None, label: str | None = None
    ) -> Pushed[DataVersion]:
        """Have the service itself read ``uri`` as the next data version."""
        body = given({"uri": uri, "format": format, "label": label})
        return self._wire.push_uri(url_path("datasets", dataset, "versions"), DataVersion, body)

    def data_versions(self, dataset: str) -> Iterator[DataVersion]:
        return self._wire.every(url_path("datasets", dataset, "versions"), DataVersion)

    def data_version(self, dataset: str, number: int) -> DataVersion:
        return self._wire.ask("GET", url_path("datasets", dataset, "versions", number), DataVersion)

    def exclude_version(self, dataset: str, number: int, reason: str) -> Excluded:
        """Leave a data version out from now on: models rewind to before it at their next update."""
        path = url_path("datasets", dataset, "versions", number, "exclude")
        return self._wire.ask("POST", path, Excluded, json={"reason": reason})

    def push_slice(
        self,
        dataset: str,
        name: str,
        source: Path | Iterable[bytes],
        *,
        data_version: int | None = None,
        format: DataFormat | None = None,
        encoding: ContentEncoding | None = None,
        progress: Progress | None = None,
    ) -> Pushed[Slice]:
        """Stream a given evaluation set, as ``push_version`` does."""
        path = url_path("datasets", dataset, "slices")
        query = {"name": name, "data_version": data_version}
        return self._wire.push(path, Slice, source, format, encoding, progress, **query)

    def import_slice(
        self,
        dataset: str,
        name: str,
        uri: str,
        *,
        data_version: int | None = None,
        format: DataFormat | None = None,
    ) -> Pushed[Slice]:
        """Have the service itself read ``uri`` as a given evaluation set."""
        body = given({"uri": uri, "format": format})
        path = url_path("datasets", dataset, "slices")
        return self._wire.push_uri(path, Slice, body, name=name, data_version=data_version)

    def slices(self, dataset: str) -> Iterator[Slice]:
        return self._wire.every(url_path("datasets", dataset, "slices"), Slice)

    # --- models ---

    def create_model(self, spec: Mapping[str, Any]) -> Model:
        """``spec`` is the body of the request: ``name``, ``dataset``, and what differs from the defaults."""
        return self._wire.ask("POST", "/models", Model, json=spec)

    def change_model(self, name: str, changes: Mapping[str, Any]) -> Model:
        return self._wire.ask("PATCH", url_path("models", name), Model, json=changes)

    def models(self) -> Iterator[Model]:
        return self._wire.every("/models", Model)

    def model(self, name: str) -> Model:
        return self._wire.ask("GET", url_path("models", name), Model)

    def model_versions(self, model: str) -> Iterator[ModelVersion]:
        return self._wire.every(url_path("models", model, "versions"), ModelVersion)

    def model_version(self, model: str, number: int | str) -> ModelVersion:
        """``number`` may be ``latest`` or ``served``."""
        return self._wire.ask("GET", url_path("models", model, "versions", number), ModelVersion)

    def download(self, model: str, number: int | str, file: str, target: Path) -> None:
        """Write one file of a version's export to ``target``."""
        folder = url_path("models", model, "versions", number, "files")
        self._wire.download(f"{folder}/{quote(file)}", target)

    def checkpoints(self, model: str) -> Iterator[Checkpoint]:
        return self._wire.every(url_path("models", model, "checkpoints"), Checkpoint)

    def forgetting(self, model: str) -> Forgetting:
        return self._wire.ask("GET", url_path("models", model, "forgetting"), Forgetting)

    def costs(self, model: str, *, tokens: int | None = None) -> Costs:
        """``tokens``: how many the next version has, for the forecast; by default as many as the last."""
        return self._wire.ask("GET", url_path("models", model, "costs"), Costs, tokens=tokens)

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
        """The line's next version; or a branch from a checkpoint, or a version under another paradigm."""
        body = given(
            {"data_version": data_version, "branch_from": branch_from, "decay": decay, "paradigm": paradigm}
        )
        return self._wire.ask("POST", url_path("models", model, "updates"), Update, json=body)

    def updates(self, model: str) -> Iterator[Update]:
        return self._wire.every(url_path("models", model, "updates"), Update)

    def update(self, update_id: str) -> Update:
        return self._wire.ask("GET", url_path("updates", update_id), Update)

    def cancel_update(self, update_id: str) -> Update:
        return self._wire.ask("POST", url_path("updates", update_id, "cancel"), Update)

    def retry_update(self, update_id: str) -> Update:
        return self._wire.ask("POST", url_path("updates", update_id, "retry"), Update)

    def metrics(self, update_id: str, stage_id: str) -> list[MetricPoint]:
        return self._wire.ask("GET", url_path("updates", update_id, "metrics"), Metrics, stage=stage_id).data

    def release(
        self,
        model: str,
        version: int | str,
        *,
        reason: str | None = None,
        rollout: Mapping[str, Any] | None = None,
    ) -> Release:
        """``version`` may be ``previous``: what was served before that which is served now."""
        body = given({"version": version, "reason": reason, "rollout": rollout})
        return self._wire.ask("POST", url_path("models", model, "releases"), Release, json=body)

    def releases(self, model: str) -> Iterator[Release]:
        return self._wire.every(url_path("models", model, "releases"), Release)

    def serving(self, model: str) -> Serving:
        """What the model should answer with, and what its replicas said last."""
        return self._wire.ask("GET", url_path("models", model, "serving"), Serving)

    # --- events and health ---

    def events(self, after: str | None = None) -> Iterator[Event]:
        """What has happened, ever or after that event, up to now."""
        return self._wire.every("/events", Event, after)

    def follow(self, after: str = "latest") -> Iterator[Event]:
        """What happens from now on, or after that event, as it happens, without end.

        Once it is connected it comes back after every interruption, and loses nothing by it.
        """
        return self._wire.follow("/events", after)

    def ready(self) -> Health:
        """Raises ApiError that names the parts which do not answer."""
        return self._wire.ask("GET", "/readyz", Health, base="")
