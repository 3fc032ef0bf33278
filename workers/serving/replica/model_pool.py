"""The versions that a replica has loaded, which of them is served, and which could not be loaded.

``loading`` adds versions and ``routing`` picks the one that answers a request. One condition variable guards
all state. A request keeps its version until it ends, so that an answer never mixes two. A version that is no
longer wanted is closed when its last request ends.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.core.serving import ReplicaReport, Residence, ServedTarget, ServedVersion, VersionReport
from service.core.serving_specs import DEFAULT_SERVING
from service.core.traffic import NOTHING, Traffic
from workers.serving.engine.port import Engine
from workers.serving.replica.health import unhealthy_reason

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0  # memory or the artifact store may be short for a moment


@dataclass(eq=False)
class LoadedModel:
    """One loaded version. The ``on_lost`` callbacks receive the reason if the pool discards the engine."""

    version: ServedVersion
    engine: Engine
    traffic: Traffic = NOTHING
    traffic_before_trial: Traffic = NOTHING
    in_flight: int = 0
    retired: bool = False  # no longer wanted; closed when its last request ends
    lost: bool = False  # discarded because its engine died or hung
    on_lost: set[Callable[[str], None]] = field(default_factory=set)


@dataclass(frozen=True)
class LoadFailure:
    error: str
    retry_at: float


class ModelPool:
    """The loaded versions of one replica; ``served`` answers requests that name no version.

    Hold ``changed`` to read or change the public attributes.
    """

    def __init__(self, replica: str, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self.replica = replica
        self.changed = threading.Condition()
        self.target: ServedTarget | None = None
        self.models: dict[ServedVersion, LoadedModel] = {}
        self.failures: dict[ServedVersion, LoadFailure] = {}
        self.served: LoadedModel | None = None
        self.closing = False
        self._retiring: list[LoadedModel] = []
        self._served_lost = False  # the served engine was discarded and nothing has replaced it yet
        self._retry_seconds = retry_seconds

    def set_target(self, target: ServedTarget) -> None:
        """Set what to load and serve, and return at once. An equal target changes nothing."""
        with self.changed:
            previous, self.target = self.target, target
            if previous == target:
                return
            if previous is None or previous.sequence != target.sequence:
                # A new decision: trial counts start at zero, and earlier load failures say nothing about it.
                for model in self.models.values():
                    model.traffic_before_trial = model.traffic
                self.failures.clear()
            self._settle()

    def wait_until_answering(self) -> None:
        """Wait until the served version is loaded or has failed once."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.closing or self.target is None or self.target.stable not in self.missing()
            )

    def report(self) -> ReplicaReport:
        with self.changed:
            number = None if self.served is None else self.served.version.number
            sequence = 0 if self.target is None else self.target.sequence
            versions = tuple(self._version_report(version) for version in self.wanted())
            return ReplicaReport(self.replica, number, versions, sequence)

    def can_recover(self) -> bool:
        """Whether the pool serves, or can still load what it should serve.

        If the served engine was lost and its replacement failed to load, only a new process helps.
        """
        with self.changed:
            return not (self._served_lost and self._stable() in self.failures)

    def recovering(self) -> ServedVersion | None:
        """Return the version that will replace the lost served engine, if it can still be loaded.

        In the middle of a rollout that is the next version.
        """
        with self.changed:
            stable = self._stable()
            return stable if self._served_lost and not self.closing and stable not in self.failures else None

    def all_models(self) -> list[LoadedModel]:
        """Return all loaded models, including retired ones that still answer requests."""
        with self.changed:
            return [*self.models.values(), *self._retiring]

    def release(self, model: LoadedModel) -> None:
        """End one use of a model that the router acquired."""
        with self.changed:
            model.in_flight -= 1
            if model.retired and model.in_flight == 0:
                self._retiring.remove(model)
                model.engine.close()

    def count(self, model: LoadedModel, traffic: Traffic) -> None:
        with self.changed:
            model.traffic = model.traffic + traffic

    def close(self) -> None:
        """Stop loading and answering; requests in flight fail. Returns without waiting."""
        with self.changed:
            self.closing = True
            for model in list(self.models.values()):
                model.engine.close()
                self._retire(model)
            self.served = None
            self.changed.notify_all()

    # --- unhealthy engines ---

    def discard_if_unhealthy(self, model: LoadedModel) -> bool:
        """Check the engine of a model that failed a request. Returns whether the engine is lost."""
        with self.changed:
            if not (model.retired or self.closing):
                self._discard_if_unhealthy(model)
            return model.lost

    def discard_unhealthy(self) -> None:
        with self.changed:
            for model in self.all_models():
                if not model.lost:
                    self._discard_if_unhealthy(model)

    def _discard_if_unhealthy(self, model: LoadedModel) -> None:
        """Discard a dead or hung engine and fail its requests.

        If it was the served one, the version that should be served is loaded at once, even if it failed
        before. Other versions are loaded again after ``retry_seconds``.
        """
        limits = (DEFAULT_SERVING if self.target is None else self.target.spec).limits
        reason = unhealthy_reason(model.engine.status(), limits.hang_seconds)
        if reason is None:
            return
        logger.error("%s discards version %s: %s", self.replica, model.version.number, reason)
        if model is self.served:
            self.served, self._served_lost = None, True
            if (stable := self._stable()) is not None:
                self.failures.pop(stable, None)  # it may have failed for lack of the memory that is now freed
        elif not model.retired:
            self.failures[model.version] = self._failure(reason)
        model.lost = True
        if not model.retired:
            self._retire(model)
        # Do not wait for its last request: the engine must reject new ones, and its memory is needed.
        model.engine.close()
        for callback in list(model.on_lost):
            callback(reason)
        self.changed.notify_all()

    # --- used by the loading thread ---

    def wanted(self) -> list[ServedVersion]:
        """Return the versions to hold, in the order in which they are loaded."""
        if self.target is None:
            return []
        trial = [] if self.target.trial is None else [self.target.trial.version]
        stable = [] if self.target.stable is None else [self.target.stable]
        return list(dict.fromkeys([*stable, *trial, *self.target.kept]))

    def missing(self) -> list[ServedVersion]:
        return [v for v in self.wanted() if v not in self.models and v not in self.failures]

    def next_to_load(self) -> ServedVersion | None:
        """Return a wanted version that is not loaded and, if it failed before, is due for a retry."""
        now = time.monotonic()
        for version in self.wanted():
            failure = self.failures.get(version)
            if version not in self.models and (failure is None or failure.retry_at <= now):
                return version
        return None

    def should_load(self, version: ServedVersion) -> bool:
        """Whether to keep loading a version: it is wanted, and no lost served version is more urgent."""
        return not self.closing and version in self.wanted() and self.recovering() in (None, version)

    def add(self, version: ServedVersion, engine: Engine) -> None:
        """Add a loaded engine, or close it if its version is no longer wanted."""
        with self.changed:
            if self.closing or version not in self.wanted():
                engine.close()
                return
            self.failures.pop(version, None)
            self.models[version] = LoadedModel(version, engine)
            self._settle()

    def fail(self, version: ServedVersion, error: str) -> None:
        with self.changed:
            if version in self.wanted():
                self.failures[version] = self._failure(error)
            self.changed.notify_all()

    def evict_kept(self, incoming: ServedVersion) -> bool:
        """Unload the oldest kept version to make room for ``incoming``. Returns False if there is none."""
        with self.changed:
            if self.target is None or incoming in self.target.kept:
                return False
            for kept in reversed(self.target.kept):
                model = self.models.get(kept)
                if model is not None and model is not self.served:
                    self.failures[kept] = self._failure("unloaded to make room for another version")
                    self._retire(model)
                    return True
            return False

    # --- state changes, under the lock ---

    def _stable(self) -> ServedVersion | None:
        return None if self.target is None else self.target.stable

    def _settle(self) -> None:
        """Serve the stable version if it is loaded, and retire versions that are no longer wanted."""
        stable = self._stable()
        if stable is None:
            self.served, self._served_lost = None, False
        elif stable in self.models:
            self.served, self._served_lost = self.models[stable], False
        wanted = self.wanted()
        for model in list(self.models.values()):
            if model.version not in wanted and model is not self.served:
                self._retire(model)
        for version in [version for version in self.failures if version not in wanted]:
            del self.failures[version]
        self.changed.notify_all()

    def _retire(self, model: LoadedModel) -> None:
        del self.models[model.version]
        model.retired = True
        if model.in_flight == 0:
            model.engine.close()
        else:
            self._retiring.append(model)

    def _failure(self, error: str) -> LoadFailure:
        return LoadFailure(error, time.monotonic() + self._retry_seconds)

    def _version_report(self, version: ServedVersion) -> VersionReport:
        model, failure = self.models.get(version), self.failures.get(version)
        if model is not None:
            tried = model.traffic - model.traffic_before_trial
            return VersionReport(version.number, Residence.READY, None, model.traffic, tried)
        if failure is not None:
            return VersionReport(version.number, Residence.FAILED, failure.error)
        return VersionReport(version.number, Residence.LOADING)
