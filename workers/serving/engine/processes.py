"""Where the processes of engines come from: each is forked from one that has imported everything and computed nothing."""

import time
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess

context = get_context("forkserver")
context.set_forkserver_preload(["workers.serving.engine.decoding_process"])


def prepare() -> None:
    """Begin to import what they need, and return at once: half of what the first engine would else wait for."""
    forkserver.ensure_running()


def start(process: ForkServerProcess) -> None:
    """Where the one that forks has died a moment ago, it is taken for alive once, and another is started then."""
    try:
        process.start()
    except (EOFError, OSError):
        time.sleep(0.1)
        process.start()
