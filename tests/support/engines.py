"""The processes in which a replica's versions are decoded."""

import psutil


def engine_pids(replica_pid: int) -> list[int]:
    """Oldest first. The replica has them forked by a process of its own."""
    forked = [process for child in psutil.Process(replica_pid).children() for process in child.children()]
    return [process.pid for process in sorted(forked, key=lambda process: process.create_time())]
