"""Shutdown deadlines, in seconds after SIGTERM. They hold for one process and for all of ``pathswitch up``.

18 s  accepted work may finish: requests, streams, the current training step and its checkpoint
23 s  a process that is still running ends immediately; files and rows are consistent at any time
30 s  the processes that the others depend on under ``up`` (Ray) have ended too
"""

import signal

DRAIN_SECONDS = 18
PROCESS_SECONDS = 23
ALL_SECONDS = 30


def set_exit_deadline() -> None:
    """Have the kernel end this process in PROCESS_SECONDS, whatever it is waiting for.

    Safe in a signal handler.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PROCESS_SECONDS)
