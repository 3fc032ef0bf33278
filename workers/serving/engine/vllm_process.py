"""What runs inside vLLM's own processes: a general plugin of vLLM, named in pyproject.toml."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, by kill -9 too: vLLM's engine would stay for ever, with
    all the memory that it has. vLLM may call it more than once.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
