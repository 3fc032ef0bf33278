"""One load of an engine, in a thread of its own: it may take longer than anybody waits for it, or never end."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from workers.serving.engine.port import Engine


class Loading:
    """Begins at once. ``load`` may take ``seconds``; ``ended`` is called when it is over, from any thread."""

    def __init__(
        self, name: str, load: Callable[[], Engine], seconds: float, ended: Callable[[], None]
    ) -> None:
        self._load = load
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._engine: Future[Engine] = Future()
        self._engine.add_done_callback(lambda _: ended())
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def seconds_left(self) -> float:
        """0 once it is over, or its time is."""
        return 0.0 if self._engine.done() else max(self._deadline - time.monotonic(), 0.0)

    def take(self) -> Engine | None:
        """The engine; None where it is taken before it is there. Raises what loading raised, and TimeoutError past its time. An
        engine that comes later than it is taken is closed.
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
