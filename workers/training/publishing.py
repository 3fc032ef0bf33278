"""Publishes periodic checkpoints on a background thread while training continues."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from service.artifacts import Artifacts
from workers.training.checkpoint import Snapshot

logger = logging.getLogger(__name__)


class CheckpointPublisher:
    """Publishes one snapshot at a time, so that memory never holds two.

    A periodic checkpoint that cannot be written (the disk is full, the store is down) does not end the run: the error
    is logged, and the run only repeats more steps if it is interrupted. ``publish`` waits, and raises such errors.
    """

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def publish_in_background(self, key: str, snapshot: Snapshot, result: dict[str, Any]) -> None:
        """Publish while training continues. Call ``wait`` before making the snapshot."""
        assert self._pending is None
        self._pending = self._thread.submit(self.publish, key, snapshot, result)

    def wait(self) -> None:
        """Wait for the background checkpoint, if there is one, and log its error."""
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending.exception()) is not None:
            logger.error("a checkpoint could not be published; training continues without it", exc_info=error)

    def publish(self, key: str, snapshot: Snapshot, result: dict[str, Any]) -> None:
        """Publish unless the key exists: all models of a line share the trunk's checkpoints, and the bits are equal."""
        if self._artifacts.manifest(key) is None:
            with self._artifacts.writing(key) as directory:
                snapshot.write(directory)
                self._artifacts.publish(key, directory, result)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        self._thread.shutdown()
