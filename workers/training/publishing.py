"""Checkpoints on the way, published by a thread of their own while training goes on."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from service.artifacts import Artifacts
from workers.training.checkpoint import Snapshot

logger = logging.getLogger(__name__)


class CheckpointPublisher:
    """Publishes one snapshot at a time: the next waits for the one before, so that there are never two in memory.

    A checkpoint on the way that cannot be written (the disk is full, the store is away) costs steps if the run is
    interrupted, and not the run: it is told, and the next one is tried. One that is waited for raises.
    """

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._under_way: Future[None] | None = None

    def begin(self, key: str, snapshot: Snapshot, result: dict[str, Any]) -> None:
        """Publish while training goes on. ``settle`` first: only then make the snapshot."""
        assert self._under_way is None
        self._under_way = self._thread.submit(self.publish, key, snapshot, result)

    def settle(self) -> None:
        """Wait for what was begun."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None and (error := under_way.exception()) is not None:
            logger.error("a checkpoint could not be published; training goes on without it", exc_info=error)

    def publish(self, key: str, snapshot: Snapshot, result: dict[str, Any]) -> None:
        """Publish, unless it is already. A trunk's checkpoint is every model's on that line: whoever was first wrote the same."""
        if self._artifacts.manifest(key) is None:
            with self._artifacts.writing(key) as directory:
                snapshot.write(directory)
                self._artifacts.publish(key, directory, result)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        self._thread.shutdown()
