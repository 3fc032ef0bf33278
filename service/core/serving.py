"""The port through which the orchestrator has model versions served: desired in, observed out.

Level-triggered: ``apply`` is called on every tick with all that should be served, changes only what differs, and returns
without waiting; ``observe`` reports what every replica answers with now. A new version is loaded beside the old one and
swapped in when warm, so that no request is dropped; requests in flight keep the version they began with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ServedTarget:
    """What one model line should answer with. ``number`` and ``key`` are None before its first release."""

    model: str
    number: int | None
    key: str | None  # artifact key of the export
    sequence: int = 0  # rises with every decision about what the line should answer with


@dataclass(frozen=True)
class ReplicaReport:
    """What one replica answers with, and, where its newest target could not be loaded, why."""

    replica: str
    number: int | None
    failed_number: int | None = None
    error: str | None = None


class Serving(Protocol):
    def url(self) -> str:
        """Base URL of the OpenAI-compatible endpoint, without ``/v1``."""
        ...

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        """Make the targets desired. Raises Unavailable while serving does not answer.

        A target of a lower ``sequence`` than the line has is left alone: several orchestrators tell of what they have
        read, and the last to speak need not be the last to have read.
        """
        ...

    def observe(self) -> Mapping[str, Sequence[ReplicaReport]]:
        """Model name -> one report per replica that should run; a replica that does not answer reports number None."""
        ...

    def close(self) -> None:
        """Let go of what outlives this process. Of what does not: refuse new requests, and let those in flight finish."""
        ...
