"""Loads the wanted versions into the pool, one at a time, while the loaded ones keep answering.

A load that fails leaves everything as it was and is tried again later.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from service.core.serving import ServedVersion
from service.core.serving_specs import LimitsSpec
from workers.serving.engine.port import Engine, EngineLoader
from workers.serving.replica.background_load import BackgroundLoad
from workers.serving.replica.model_pool import ModelPool
from workers.serving.replica.warm_up import warm_up

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
FREED_SECONDS = 5.0  # how long the memory of a closed engine may take to become free


class NotEnoughMemory(Exception):
    """A version does not fit into memory alongside the loaded ones."""


class LoadingThread:
    """Loads versions in a thread of its own, which also discards unhealthy engines every ``WATCH_SECONDS``."""

    def __init__(
        self, pool: ModelPool, open_export: Callable[[str], Path], engine_loader: EngineLoader
    ) -> None:
        self._pool = pool
        self._open_export = open_export
        self._engine_loader = engine_loader
        self._thread = threading.Thread(target=self._run, name=f"load-{pool.replica}", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while (version := self._next_version()) is not None:
            try:
                engine = self._load_in_background(version)
            except Exception as error:  # reported; the served version keeps answering
                reason = f"{type(error).__name__}: {error}"
                # A version that does not fit is retried often, so its traceback is not logged.
                logger.error(
                    "%s cannot load version %s: %s",
                    *(self._pool.replica, version.number, reason),
                    exc_info=not isinstance(error, NotEnoughMemory),
                )
                self._pool.fail(version, reason)
                continue
            if engine is not None:
                self._pool.add(version, engine)
            del engine  # or this thread would keep an unloaded version in memory

    def _next_version(self) -> ServedVersion | None:
        """Wait for a version to load. Returns None once the pool is closed."""
        pool = self._pool
        with pool.changed:
            while not pool.closing:
                if (version := pool.next_to_load()) is not None:
                    return version
                pool.changed.wait(WATCH_SECONDS)
                pool.discard_unhealthy()
            return None

    def _load_in_background(self, version: ServedVersion) -> Engine | None:
        """Return the engine of a version once it is warm, or None if the version is no longer wanted."""
        pool = self._pool
        assert pool.target is not None
        limits = pool.target.spec.limits
        load = BackgroundLoad(
            f"load-{version.number}", partial(self._load, version, limits), limits.load_seconds, self._wake
        )
        with pool.changed:
            while (seconds := load.seconds_left) and pool.should_load(version):
                pool.changed.wait(min(WATCH_SECONDS, seconds))
                pool.discard_unhealthy()
        return load.result()

    def _load(self, version: ServedVersion, limits: LimitsSpec) -> Engine:
        deadline = time.monotonic() + limits.load_seconds
        folder = self._open_export(version.key)
        if time.monotonic() >= deadline:
            raise TimeoutError("opening the export took too long")  # before any version is evicted for it
        self._make_room(version, self._engine_loader.needed_bytes(folder))
        engine = self._engine_loader.load(folder, max(deadline - time.monotonic(), 0.0))
        try:
            warm_up(engine, limits, deadline - time.monotonic())
        except BaseException:
            engine.close()
            raise
        return engine

    def _make_room(self, version: ServedVersion, num_bytes: int) -> None:
        """Evict kept versions until there is enough memory. Raises NotEnoughMemory if there still is not.

        The first version is loaded regardless: ``num_bytes`` is an upper bound, and no other version is at
        risk.
        """
        self._wait_for_memory(num_bytes)  # an engine that was just discarded may still be freeing its memory
        while self._pool.models and (free := self._engine_loader.free_bytes()) < num_bytes:
            if not self._pool.evict_kept(version):
                raise NotEnoughMemory(
                    f"the version needs {num_bytes >> 20} MiB in addition to the loaded ones, "
                    f"but only {free >> 20} MiB are free"
                )
            self._wait_for_memory(num_bytes)

    def _wait_for_memory(self, num_bytes: int) -> None:
        deadline = time.monotonic() + (FREED_SECONDS if self._pool.models else 0)
        while self._engine_loader.free_bytes() < num_bytes and time.monotonic() < deadline:
            time.sleep(0.1)

    def _wake(self) -> None:
        with self._pool.changed:
            self._pool.changed.notify_all()
