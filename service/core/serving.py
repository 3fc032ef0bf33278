"""The port through which the orchestrator has model versions served: desired in, observed out.

Level-triggered: ``apply`` is called on every tick with all that should be served, changes only what differs, and returns
without waiting; ``observe`` reports what every replica answers with now. A new version is loaded beside the old one and
swapped in when warm, so that no request is dropped; requests in flight keep the version they began with.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from service.core.serving_specs import DEFAULT_SERVING, ServingSpec
from service.core.traffic import NOTHING, Traffic


@dataclass(frozen=True)
class ServedVersion:
    number: int
    key: str  # artifact key of the export


@dataclass(frozen=True)
class Trial:
    """A version that is loaded beside the served one before it may take over: ``share`` of the requests are answered by
    it, a copy of ``shadowed`` of them is given to it, and where it is ``scored`` both versions' loss on those is measured.
    """

    version: ServedVersion
    share: float = 0.0
    shadowed: float = 0.0
    scored: bool = False


@dataclass(frozen=True)
class ServedTarget:
    """What one model line should answer with: ``stable``, None before its first release.

    ``kept`` are earlier versions that stay loaded where there is room. ``rolling``: replicas hold ``stable`` alone, and are
    replaced one by one when it changes. ``awake``: not scaled to zero for the moment. ``proven``: the line has been
    live, so that a replica that cannot load ``stable`` must not stand beside those that have.
    """

    model: str
    stable: ServedVersion | None
    trial: Trial | None = None
    kept: tuple[ServedVersion, ...] = ()
    sequence: int = 0  # rises with every decision about what the line should answer with
    spec: ServingSpec = DEFAULT_SERVING
    rolling: bool = False
    awake: bool = True
    proven: bool = False


class EngineName(StrEnum):
    AUTO = "auto"  # vLLM where it is installed and there is a GPU
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Residence(StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class VersionReport:
    """A version that a replica was told to hold. ``traffic``: what it has answered there since it was loaded.

    ``tried``: the part of ``traffic`` since the present trial began, of the version that is tried and of the served one.
    """

    number: int
    state: Residence
    error: str | None = None
    traffic: Traffic = NOTHING
    tried: Traffic = NOTHING


@dataclass(frozen=True)
class ReplicaReport:
    """``number``: what the replica answers with where no version is named; None: it does not answer. ``sequence``: of the
    target that it was told last; what it says of ``versions`` is of that. ``starting``: it will answer with what is then
    desired, once it is up, if it ever is.
    """

    replica: str
    number: int | None
    versions: tuple[VersionReport, ...] = ()
    sequence: int = 0
    starting: bool = False

    def version(self, number: int) -> VersionReport | None:
        return next((version for version in self.versions if version.number == number), None)


class Serving(Protocol):
    def url(self) -> str:
        """Base URL of the OpenAI-compatible endpoint, without ``/v1``."""
        ...

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        """Make the targets desired. Raises Unavailable while serving does not answer.

        A target of a lower ``sequence`` than the line has is left alone: several orchestrators tell of what they have
        read, and the last to speak need not be the last to have read. Where it stays lower, the database was put
        back, and is right.
        """
        ...

    def observe(self, models: Collection[str]) -> Mapping[str, Sequence[ReplicaReport]]:
        """Of those ``models``: name -> a report per replica that should run; one that does not answer reports number None."""
        ...

    def close(self) -> None:
        """Let go of what outlives this process. Of what does not: refuse new requests, and let those in flight finish."""
        ...
