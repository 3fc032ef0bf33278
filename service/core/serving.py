"""The port through which the orchestrator serves model versions: desired state in, observed state out.

It is level-triggered: every tick calls ``apply`` with everything that should be served. ``apply`` changes
only what differs and returns without waiting; ``observe`` reports what every replica answers with now. A
replica loads a new version alongside the old one and swaps once it is warm, so that no request is dropped.
Requests in flight keep the version they started with.
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
    """A version on trial alongside the served one, before it may replace it.

    It answers ``share`` of the requests and gets copies of ``shadowed`` of them. If ``scored``, the loss of
    both versions on the copied prompts is measured.
    """

    version: ServedVersion
    share: float = 0.0
    shadowed: float = 0.0
    scored: bool = False


@dataclass(frozen=True)
class ServedTarget:
    """What one model line should answer with: ``stable``, None before its first release.

    ``kept``: earlier versions that stay loaded while memory allows. ``rolling``: replicas hold ``stable``
    alone and are replaced one by one when it changes. ``awake``: do not scale to zero for now. ``proven``:
    the line has been live, so a replica that cannot load ``stable`` must not join the ones that did.
    """

    model: str
    stable: ServedVersion | None
    trial: Trial | None = None
    kept: tuple[ServedVersion, ...] = ()
    sequence: int = 0  # rises with every decision about which version the line serves
    spec: ServingSpec = DEFAULT_SERVING
    rolling: bool = False
    awake: bool = True
    proven: bool = False


class EngineName(StrEnum):
    AUTO = "auto"  # vLLM if it is installed and there is a GPU, else transformers
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Residence(StrEnum):
    """State of a version on a replica."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class VersionReport:
    """State of a wanted version on a replica, and its ``traffic`` there since it was loaded.

    ``tried``: the part of ``traffic`` since the current trial started, for the version on trial and the
    served one.
    """

    number: int
    state: Residence
    error: str | None = None
    traffic: Traffic = NOTHING
    tried: Traffic = NOTHING


@dataclass(frozen=True)
class ReplicaReport:
    """What one replica serves. ``number``: the version for requests that name none, or None if it has none.

    ``sequence`` comes from the replica's latest target; ``versions`` reports on that target. ``starting``: the
    replica is not up yet, and may never be.
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
        """Return the base URL of the OpenAI-compatible endpoint, without ``/v1``."""
        ...

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        """Make the targets the desired state. Raises Unavailable while serving is not responding.

        A target with a lower ``sequence`` than the line already has is ignored: with several orchestrators,
        the last to call may have read the database first. If its sequence stays lower, the database was
        restored from a backup and takes precedence.
        """
        ...

    def observe(self, models: Collection[str]) -> Mapping[str, Sequence[ReplicaReport]]:
        """Return a report per replica that should run, by model; silent replicas have number None."""
        ...

    def close(self) -> None:
        """Finish the requests in flight and stop what ends with this process; leave the rest running."""
        ...
