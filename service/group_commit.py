"""Group commit: what costs about as much for many as for one is done once for all who wait for it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import Context
from typing import Generic, TypeVar

from service.core.errors import Unavailable

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class GroupCommit(Generic[Item, Outcome]):
    """Whoever comes while a round is under way is in the next one, which the first to wake carries out.

    ``work`` takes a round and returns an outcome for each of it, in order. It does all of a round or, where it raises,
    nothing of it. It runs in a context of its own: what the threads have set in theirs must come with the items.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Outcome]]) -> None:
        self._work = work
        self._turn = threading.Lock()
        self._queue = threading.Lock()
        self._waiting: list[tuple[Item, Future[Outcome]]] = []

    def do(self, item: Item) -> Outcome:
        """Have ``item`` done, by this thread or another. Raises what its work raised."""
        future: Future[Outcome] = Future()
        with self._queue:
            self._waiting.append((item, future))
        with self._turn:
            if not future.done():
                with self._queue:
                    entries, self._waiting = self._waiting, []
                self._round(entries)
        return future.result()

    def _round(self, entries: Sequence[tuple[Item, Future[Outcome]]]) -> None:
        try:
            outcomes = Context().run(self._work, [item for item, _ in entries])
        except BaseException as error:
            # What is wrong with one is no fault of the others. What failed for lack of a database would fail again.
            if len(entries) > 1 and isinstance(error, Exception) and not isinstance(error, Unavailable):
                for entry in entries:
                    self._round([entry])
                return
            for _, future in entries:
                future.set_exception(error)
            return
        for (_, future), outcome in zip(entries, outcomes, strict=True):
            future.set_result(outcome)
