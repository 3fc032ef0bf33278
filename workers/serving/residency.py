"""Which versions a replica holds, and which of them answers what.

Versions are loaded one after another by a thread of their own, beside those that answer; then a pointer moves. Whoever
takes a version keeps it to the end of its request, so that an answer never mixes two; one that nobody wants any more is
closed when the last such request ends. What cannot be loaded leaves everything as it was and is tried again later.
"""

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from service.core.serving import ReplicaReport, Residence, ServedTarget, ServedVersion, VersionReport
from service.core.serving_specs import DEFAULT_SERVING, LimitsSpec
from service.core.traffic import NOTHING, Traffic
from workers.serving.engine.port import Engine, EngineLoader, EngineStatus
from workers.serving.generation import Served, not_ready, unknown_version
from workers.serving.loading import Loading
from workers.serving.warm_up import warm_up

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0  # a load may fail for want of memory or of the artifact store for a moment
WATCH_SECONDS = 1.0
HUNG_SECONDS = 10.0  # at one turn, and HUNG_TURNS times as long as the longest before it
HUNG_TURNS = 10.0
FREED_SECONDS = 5.0  # how long the memory of a closed engine may take to come back


class NotEnoughMemory(Exception):
    """There is no room beside the versions that are loaded."""


@dataclass(eq=False)
class Resident:
    """A version that is loaded. ``given_up`` are told why, should it be taken away from those that it answers."""

    version: ServedVersion
    engine: Engine
    traffic: Traffic = NOTHING
    before_trial: Traffic = NOTHING
    in_flight: int = 0
    retired: bool = False
    lost: bool = False  # its engine was given up
    given_up: set[Callable[[str], None]] = field(default_factory=set)


@dataclass(frozen=True)
class _Failure:
    error: str
    retry_at: float


class Residency:
    """``open_export`` verifies and gives the folder of a key."""

    def __init__(
        self,
        replica: str,
        open_export: Callable[[str], Path],
        loader: EngineLoader,
        *,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._replica = replica
        self._open_export = open_export
        self._loader = loader
        self._retry_seconds = retry_seconds
        self._target: ServedTarget | None = None
        self._residents: dict[ServedVersion, Resident] = {}
        self._leaving: list[Resident] = []  # they still answer what they had begun
        self._failures: dict[ServedVersion, _Failure] = {}
        self._current: Resident | None = None
        self._lost = False  # whether the engine that answered was given up, and no other answers yet
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._hold_what_is_wanted, name=f"load-{replica}", daemon=True)
        self._thread.start()

    def set_target(self, target: ServedTarget) -> None:
        """Make it desired and return at once; the latest call wins, the same target again changes nothing."""
        with self._changed:
            before, self._target = self._target, target
            if before == target:
                return
            if before is None or before.sequence != target.sequence:
                # Another decision: what counts for a trial begins, and whoever decided is told anew what comes of it.
                for resident in self._residents.values():
                    resident.before_trial = resident.traffic
                self._failures.clear()
            self._settle()

    def wait_until_settled(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything wanted is loaded or has failed once. False when the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closing or not self._missing(), timeout_seconds)

    def wait_until_answering(self) -> None:
        """Wait until the served version is loaded or has failed once."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._target is None or self._target.stable not in self._missing()
            )

    def report(self) -> ReplicaReport:
        with self._changed:
            number = None if self._current is None else self._current.version.number
            sequence = 0 if self._target is None else self._target.sequence
            versions = tuple(self._reported(version) for version in self._wanted())
            return ReplicaReport(self._replica, number, versions, sequence)

    def healthy(self) -> bool:
        """Whether it can answer, or still load what would. Where what answered was lost and what should answer cannot be
        loaded either, it takes another process.
        """
        with self._changed:
            return self._thread.is_alive() and not (self._lost and self._stable() in self._failures)

    @property
    def recovers(self) -> bool:
        """Whether the served version is being loaded, after the engine that answered was given up."""
        with self._changed:
            return not self._closing and self._recovering() is not None

    def residents(self) -> list[Resident]:
        """Those that are let go of among them, as long as they answer."""
        with self._changed:
            return [*self._residents.values(), *self._leaving]

    @property
    def target(self) -> ServedTarget | None:
        return self._target

    def take(self, number: int | None = None, affinity: str | None = None) -> Resident:
        """The version that answers: the one of that number, or the served one, or the one that is tried for its share of
        those that name none, the same for the same ``affinity``. To be given back. Raises RequestRefused.
        """
        with self._changed:
            resident = (
                self._numbered(number) if number is not None else self._tried(affinity) or self._served()
            )
            resident.in_flight += 1
            return resident

    def take_served(self) -> Resident:
        """The served one. To be given back. Raises RequestRefused."""
        with self._changed:
            resident = self._served()
            resident.in_flight += 1
            return resident

    def take_tried(self) -> Resident | None:
        """The one that is tried, where it is loaded. To be given back."""
        with self._changed:
            resident = self._trial()
            if resident is not None:
                resident.in_flight += 1
            return resident

    def give_back(self, resident: Resident) -> None:
        with self._changed:
            resident.in_flight -= 1
            if resident.retired and resident.in_flight == 0:
                self._leaving.remove(resident)
                resident.engine.close()

    def give_up_if_ill(self, resident: Resident) -> bool:
        """For whom it has failed: whether its engine is given up."""
        with self._changed:
            if not (resident.retired or self._closing):
                self._give_up_if_ill(resident)
            return resident.lost

    def count(self, resident: Resident, traffic: Traffic) -> None:
        with self._changed:
            resident.traffic = resident.traffic + traffic

    def close(self) -> None:
        """Stop loading and answering; requests in flight fail. Returns without waiting."""
        with self._changed:
            self._closing = True
            for resident in list(self._residents.values()):
                resident.engine.close()
                self._retire(resident)
            self._current = None
            self._changed.notify_all()

    # --- who answers; all under the lock -----------------------------------------------------------------------------

    def _served(self) -> Resident:
        if self._current is not None:
            return self._current
        target = self._target
        if target is None or target.stable is None:
            raise not_ready("No version of this model has been released yet")
        stable = target.stable
        state = "could not be loaded" if stable in self._failures else "is being loaded"
        raise not_ready(f"Version {stable.number} of the model `{target.model}` {state}")

    def _numbered(self, number: int) -> Resident:
        for version, resident in self._residents.items():
            if version.number == number:
                return resident
        if self._target is not None and number in {version.number for version in self._missing()}:
            raise not_ready(f"Version {number} of the model `{self._target.model}` is being loaded")
        raise unknown_version(self._target.model if self._target else "", number, self._numbers())

    def _numbers(self) -> list[int]:
        return sorted(version.number for version in self._residents)

    def _tried(self, affinity: str | None) -> Resident | None:
        resident = self._trial()
        if resident is None or self._target is None or self._target.trial is None:
            return None
        return resident if _draw(resident.version, affinity) < self._target.trial.share else None

    def _trial(self) -> Resident | None:
        trial = None if self._target is None else self._target.trial
        return None if trial is None else self._residents.get(trial.version)

    # --- what is held; all under the lock ----------------------------------------------------------------------------

    def _wanted(self) -> list[ServedVersion]:
        return [] if self._target is None else _wanted(self._target)

    def _stable(self) -> ServedVersion | None:
        return None if self._target is None else self._target.stable

    def _recovering(self) -> ServedVersion | None:
        """What is to answer again, and can still be loaded: what did before, or in the middle of a rollout the next."""
        stable = self._stable()
        return stable if self._lost and stable not in self._failures else None

    def _missing(self) -> list[ServedVersion]:
        return [v for v in self._wanted() if v not in self._residents and v not in self._failures]

    def _settle(self) -> None:
        """Move the pointer where it should be, and let go of what nobody wants."""
        stable = self._stable()
        if stable is None:
            self._current, self._lost = None, False
        elif stable in self._residents:
            self._current = self._residents[stable]
            self._lost = False
        wanted = self._wanted()
        for resident in list(self._residents.values()):
            if resident.version not in wanted and resident is not self._current:
                self._retire(resident)
        for version in [version for version in self._failures if version not in wanted]:
            del self._failures[version]
        self._changed.notify_all()

    def _retire(self, resident: Resident) -> None:
        del self._residents[resident.version]
        resident.retired = True
        if resident.in_flight == 0:
            resident.engine.close()
        else:
            self._leaving.append(resident)

    def _reported(self, version: ServedVersion) -> VersionReport:
        resident, failure = self._residents.get(version), self._failures.get(version)
        if resident is not None:
            tried = resident.traffic - resident.before_trial
            return VersionReport(version.number, Residence.READY, None, resident.traffic, tried)
        if failure is not None:
            return VersionReport(version.number, Residence.FAILED, failure.error)
        return VersionReport(version.number, Residence.LOADING)

    # --- the thread that loads ---------------------------------------------------------------------------------------

    def _hold_what_is_wanted(self) -> None:
        while (version := self._next()) is not None:
            try:
                engine = self._loaded(version)
            except Exception as error:  # what answers goes on answering, and the report says why
                what = f"{type(error).__name__}: {error}"
                # Tried again and again, where there is no room: a line each time is enough.
                traceback = not isinstance(error, NotEnoughMemory)
                logger.error(
                    "version %s cannot be loaded by %s: %s",
                    *(version.number, self._replica, what),
                    exc_info=traceback,
                )
                self._fail(version, what)
                continue
            if engine is None:
                continue
            with self._changed:
                if self._closing or version not in self._wanted():
                    engine.close()
                else:
                    self._failures.pop(version, None)
                    self._residents[version] = Resident(version, engine)
                    self._settle()
            del engine  # this thread must not keep a version alive that has been let go of

    def _next(self) -> ServedVersion | None:
        """Wait for a version that is wanted and not held: one that failed, again after a while. None once closed."""
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                for version in self._wanted():
                    failure = self._failures.get(version)
                    if version not in self._residents and (failure is None or failure.retry_at <= now):
                        return version
                self._changed.wait(WATCH_SECONDS)
                self._give_up_the_ill()
            return None

    def _loaded(self, version: ServedVersion) -> Engine | None:
        """The engine of a version, once it has shown what it can; None where nobody wants it any more."""
        target = self._target
        assert target is not None
        limits = target.spec.limits
        loading = Loading(
            f"load-{version.number}", partial(self._load, version, limits), limits.load_seconds, self._wake
        )
        with self._changed:
            while (
                (left := loading.seconds_left)
                and version in self._wanted()
                and not self._closing
                and self._recovering() in (None, version)  # nothing is more urgent
            ):
                self._changed.wait(min(WATCH_SECONDS, left))
                self._give_up_the_ill()
        return loading.take()

    def _load(self, version: ServedVersion, limits: LimitsSpec) -> Engine:
        deadline = time.monotonic() + limits.load_seconds
        folder = self._open_export(version.key)
        if time.monotonic() >= deadline:
            raise TimeoutError("opened too late")  # nobody waits for it any more: nothing must make room
        self._make_room(version, self._loader.needed_bytes(folder))
        engine = self._loader.load(folder, max(deadline - time.monotonic(), 0.0))
        try:
            warm_up(engine, limits, deadline - time.monotonic())
        except BaseException:
            engine.close()
            raise
        return engine

    def _make_room(self, version: ServedVersion, needed: int) -> None:
        """Let go of kept versions where the memory is needed. Raises NotEnoughMemory where it is not there even then.

        What is loaded first is not held to it: the need is an upper end, and there is nothing here to protect.
        """
        self._wait_for_room(needed)  # the memory of an engine that was just given up may be on its way
        while self._residents and (free := self._loader.free_bytes()) < needed:
            if not self._let_go_of_one_kept(version):
                raise NotEnoughMemory(
                    f"{needed >> 20} MiB are needed beside what is loaded, {free >> 20} MiB are free"
                )
            self._wait_for_room(needed)

    def _wait_for_room(self, needed: int) -> None:
        deadline = time.monotonic() + (FREED_SECONDS if self._residents else 0)
        while self._loader.free_bytes() < needed and time.monotonic() < deadline:
            time.sleep(0.1)

    def _let_go_of_one_kept(self, version: ServedVersion) -> bool:
        with self._changed:
            if self._target is None or version in self._target.kept:
                return False
            for kept in reversed(self._target.kept):
                resident = self._residents.get(kept)
                if resident is not None and resident is not self._current:
                    self._failures[kept] = _Failure(
                        "let go of to make room", time.monotonic() + self._retry_seconds
                    )
                    self._retire(resident)
                    return True
        return False

    def _fail(self, version: ServedVersion, error: str) -> None:
        with self._changed:
            if version in self._wanted():
                self._failures[version] = _Failure(error, time.monotonic() + self._retry_seconds)
            self._changed.notify_all()

    def _give_up_the_ill(self) -> None:
        for resident in [*self._residents.values(), *self._leaving]:
            if not resident.lost:
                self._give_up_if_ill(resident)

    def _give_up_if_ill(self, resident: Resident) -> None:
        """Take an engine that hangs or has died away from those that it answers. Where that was the one that answers, what
        should answer is loaded at once, though it may have failed before; the rest after a while.
        """
        limits = DEFAULT_SERVING.limits if self._target is None else self._target.spec.limits
        if (reason := why_ill(resident.engine.status(), limits.hang_seconds)) is None:
            return
        logger.error("version %s is given up by %s: %s", resident.version.number, self._replica, reason)
        if resident is self._current:
            self._current, self._lost = None, True
            if (stable := self._stable()) is not None:
                self._failures.pop(stable, None)  # e.g. for want of the memory that is now given back
        elif not resident.retired:
            self._failures[resident.version] = _Failure(reason, time.monotonic() + self._retry_seconds)
        resident.lost = True
        if not resident.retired:
            self._retire(resident)
        # At once: whoever is about to ask it is told so, and its memory is needed.
        resident.engine.close()
        for tell in list(resident.given_up):
            tell(reason)
        self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def why_ill(status: EngineStatus, hang_seconds: float) -> str | None:
    """Why an engine is not counted on any more; None where it is."""
    if not status.alive:
        return "the engine has died"
    patience = min(max(HUNG_SECONDS, HUNG_TURNS * status.longest_step_seconds), hang_seconds)
    if status.stalled_seconds > patience:
        return f"the engine has hung for {status.stalled_seconds:.0f} s"
    return None


def served_by(report: ReplicaReport) -> Served | None:
    """What a replica can be asked for; None where it does not answer."""
    if report.number is None:
        return None
    loaded = {version.number for version in report.versions if version.state == Residence.READY}
    return Served(report.number, tuple(sorted(loaded | {report.number})))


def _wanted(target: ServedTarget) -> list[ServedVersion]:
    """In the order in which they are loaded."""
    trial = [] if target.trial is None else [target.trial.version]
    stable = [] if target.stable is None else [target.stable]
    return list(dict.fromkeys([*stable, *trial, *target.kept]))


def _draw(version: ServedVersion, affinity: str | None) -> float:
    """Of [0, 1): the same for the same version and affinity, on every replica."""
    if affinity is None:
        return random.random()
    digest = hashlib.blake2b(
        f"{version.number}:{affinity}".encode(errors="surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest) / (1 << 64)
