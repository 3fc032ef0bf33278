"""Starts engine processes by forking a server process that has imported everything and computed nothing."""

import time
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess

context = get_context("forkserver")
context.set_forkserver_preload(["workers.serving.engine.batching.decoder_process"])


def prepare() -> None:
    """Start the fork server in the background: its imports are half of the first engine's loading time."""
    forkserver.ensure_running()


def start(process: ForkServerProcess) -> None:
    """Start the process, with one retry.

    If the fork server has just died, only the second call starts a new one.
    """
    try:
        process.start()
    except (EOFError, OSError):
        time.sleep(0.1)
        process.start()
