"""Processes of a Ray that a test has started, found below it by what they are called, to be killed one kind at a time."""

import os
import signal
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from api.cli.up import processes
from api.cli.up.processes import Process

TRAINER = "ray::RayTrainWorker"


def trainers(root: int) -> set[Process]:
    """The ranks of what is being trained below the process ``root``."""
    return _called(root, TRAINER)


def _controller(root: int) -> set[Process]:
    return _called(root, "ray::TrainController")


def _driver(root: int) -> set[Process]:
    """The job's own process, which fits the trainer, without the shells around it."""
    return _called(root, "workers.executors.ray_job")


def _board(root: int) -> set[Process]:
    return _called(root, "ray::RunBoard")


def _raylet(root: int) -> set[Process]:
    return _called(root, "/raylet/raylet")


def _everything(root: int) -> set[Process]:
    """The head, GCS, dashboard, raylet, every worker, and jobs with what they have started."""
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
            with suppress(ProcessLookupError):  # it ended meanwhile, with what it belonged to
                os.kill(victim.pid, signal.SIGKILL)


def all_gone(victims: Collection[Process]) -> bool:
    return not any(map(processes.alive, victims))


def _called(root: int, name: str) -> set[Process]:
    """Descendants whose title begins, or whose program or module ends with that: not the shell that starts one."""
    below = processes.descendants([root], processes.all_processes())
    return {
        one
        for one in below
        if any(word.startswith(name) or word.endswith(name) for word in _command_line(one)[:3])
    }


def _command_line(process: Process) -> list[str]:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
