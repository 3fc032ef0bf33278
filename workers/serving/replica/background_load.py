"""Loads an engine in a separate thread, because a load may exceed its time limit or never return."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from workers.serving.engine.port import Engine


class BackgroundLoad:
    """Starts at once. ``load`` may take ``seconds``; ``on_done`` is called from any thread when it returns."""

    def __init__(
        self, name: str, load: Callable[[], Engine], seconds: float, on_done: Callable[[], None]
    ) -> None:
        self._load = load
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._engine: Future[Engine] = Future()
        self._engine.add_done_callback(lambda _: on_done())
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; 0 once the load has returned."""
        return 0.0 if self._engine.done() else max(self._deadline - time.monotonic(), 0.0)

    def result(self) -> Engine | None:
        """Return the engine, or abandon the load and return None; an engine that arrives later is closed.

        Raises what ``load`` raised, and TimeoutError after the deadline.
        """
        if self._engine.done():
            return self._engine.result()
        self._engine.add_done_callback(_close)
        if time.monotonic() >= self._deadline:
            raise TimeoutError(f"not loaded and warm after {self._seconds:g} s")
        return None

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self._engine.set_exception(error)
        else:
            self._engine.set_result(engine)


def _close(engine: "Future[Engine]") -> None:
    if engine.exception() is None:
        engine.result().close()
