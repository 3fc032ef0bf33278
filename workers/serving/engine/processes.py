"""Where the processes of engines come from: each is forked from one that has imported everything and computed nothing."""

from multiprocessing import forkserver, get_context

context = get_context("forkserver")
context.set_forkserver_preload(["workers.serving.engine.decoding_process"])


def prepare() -> None:
    """Begin to import what they need, and return at once: half of what the first engine would else wait for."""
    forkserver.ensure_running()
