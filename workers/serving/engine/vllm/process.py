"""Runs inside vLLM's own processes, as a general plugin of vLLM that pyproject.toml names."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, even by kill -9.

    Otherwise vLLM's engine would keep running, and keep all its memory. vLLM may call this more than once.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
