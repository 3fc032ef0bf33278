"""The port through which the HTTP interface finds models: in this process, or behind Ray Serve."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import Metric

from service.core.serving import ReplicaReport, Residence
from workers.serving.generation import AnswerItem, Generation


@dataclass(frozen=True)
class ServedModel:
    """A model that accepts requests. Clients can name any version in ``loaded``.

    ``number`` is its served version, None while no replica answers; a request to a sleeping model wakes it.
    """

    number: int | None
    loaded: tuple[int, ...]


class ModelDirectory(Protocol):
    async def served(self) -> dict[str, ServedModel]:
        """Return every model that answers now or has answered before, by name."""
        ...

    async def metrics(self) -> list[Metric]:
        """Return the Prometheus metric families of every replica."""
        ...

    def generate(self, request: Generation) -> AsyncGenerator[list[AnswerItem], None]:
        """Answer in batches of items. Failures are ``RequestRejected`` items, not exceptions."""
        ...


def served_model(report: ReplicaReport) -> ServedModel | None:
    """Return the versions that a replica can serve, or None if it serves none by default."""
    if report.number is None:
        return None
    loaded = {version.number for version in report.versions if version.state == Residence.READY}
    return ServedModel(report.number, tuple(sorted(loaded | {report.number})))
