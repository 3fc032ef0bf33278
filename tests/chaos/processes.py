"""Processes to kill. They are forked, which takes milliseconds, so the parent must have no threads and no open engine."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

FORK = multiprocessing.get_context("fork")


def forked(target: Callable[..., None], *args: Any) -> BaseProcess:
    process = FORK.Process(target=_quietly, args=(target, args))
    process.start()
    return process


def _quietly(target: Callable[..., None], args: tuple[Any, ...]) -> None:
    logging.getLogger().handlers.clear()
    logging.disable(logging.ERROR)
    target(*args)


class Fleet:
    """Orchestrator processes to kill, stop and replace. Each runs ``run(owner)`` until SIGTERM."""

    def __init__(self, run: Callable[[str], None], size: int) -> None:
        self._run = run
        self._started = 0
        self.kills = self.stops = 0
        self.crashed: list[str] = []
        self._live: dict[str, BaseProcess] = {}
        self._stopped: dict[str, BaseProcess] = {}
        for _ in range(size):
            self._start()

    def _start(self) -> None:
        self._started += 1
        owner = f"o{self._started}"
        self._live[owner] = forked(self._run, owner)

    def owners(self) -> list[str]:
        """The orchestrators that are not stopped."""
        return [owner for owner in self._live if owner not in self._stopped]

    def kill(self, owner: str) -> None:
        """Kill an orchestrator and start a new one."""
        process = self._live.pop(owner)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        self.kills += 1
        self._start()

    def stop(self, owner: str, seconds: float) -> None:
        """Stop an orchestrator with SIGSTOP for ``seconds``."""
        pid = self._live[owner].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        # In a separate process, because this one may wait for a lock that the stopped process holds.
        self._stopped[owner] = forked(_continue_after, pid, seconds)
        self.stops += 1

    def check(self) -> None:
        """Forget stops that are over, and record and replace processes that ended by themselves."""
        self._stopped = {owner: waker for owner, waker in self._stopped.items() if waker.is_alive()}
        for owner, process in list(self._live.items()):
            if not process.is_alive():
                self.crashed.append(f"{owner} ended by itself with exit code {process.exitcode}")
                del self._live[owner]
                self._start()

    def end(self) -> None:
        """Terminate all processes."""
        for waker in self._stopped.values():
            waker.join()
        self.check()
        for process in self._live.values():
            process.terminate()
        for process in self._live.values():
            process.join(20)
            if process.exitcode is None:
                process.kill()
                process.join()


def _continue_after(pid: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def stopping_at_sigterm() -> threading.Event:
    """An event that SIGTERM sets in this process."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.set())
    return stopping
