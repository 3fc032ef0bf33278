"""Finds the processes that decode for a replica."""

import psutil


def engine_pids(replica_pid: int) -> list[int]:
    """Return the engine processes of a replica, oldest first. A child of the replica forks them."""
    forked = [process for child in psutil.Process(replica_pid).children() for process in child.children()]
    return [process.pid for process in sorted(forked, key=lambda process: process.create_time())]
