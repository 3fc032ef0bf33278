"""Finds processes of a test's Ray cluster by name, so that a test can kill one kind of them."""

import os
import signal
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

import psutil

from api.cli.up import processes
from api.cli.up.processes import Process

TRAINER = "ray::RayTrainWorker"


def trainers(root: int) -> set[Process]:
    """The ranks that train below the process ``root``."""
    return _named(root, TRAINER)


def _controller(root: int) -> set[Process]:
    return _named(root, "ray::TrainController")


def _driver(root: int) -> set[Process]:
    """The driver process of a job, without the shells that started it."""
    return _named(root, "workers.executors.ray_job")


def _board(root: int) -> set[Process]:
    return _named(root, "ray::RunBoard")


def _raylet(root: int) -> set[Process]:
    return _named(root, "/raylet/raylet")


def _everything(root: int) -> set[Process]:
    """The head, GCS, dashboard, raylet, all workers, and the jobs with their descendants."""
    [raylet] = _raylet(root)
    table = processes.all_processes()
    head = table[table[raylet.pid].parent].process
    return {head} | processes.descendants([head.pid], table)


VICTIMS: dict[str, Callable[[int], set[Process]]] = {
    "worker": trainers,
    "controller": _controller,
    "driver": _driver,
    "board": _board,
    "raylet": _raylet,
    "ray": _everything,
}


def kill(victims: Iterable[Process]) -> None:
    for victim in victims:
        if processes.alive(victim):
            with suppress(ProcessLookupError):  # it ended with its parent in the meantime
                os.kill(victim.pid, signal.SIGKILL)


def all_gone(victims: Collection[Process]) -> bool:
    return not any(map(processes.alive, victims))


def _named(root: int, name: str) -> set[Process]:
    """Descendants whose title starts, or whose program or module ends, with ``name``. Shells do not match."""
    below = processes.descendants([root], processes.all_processes())
    return {
        one
        for one in below
        if any(word.startswith(name) or word.endswith(name) for word in _command_line(one)[:3])
    }


def _command_line(process: Process) -> list[str]:
    try:
        return psutil.Process(process.pid).cmdline()
    except psutil.NoSuchProcess:
        return []
