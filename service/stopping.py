"""The end of a process that was asked to stop."""

import signal

from service.core.stopping import PROCESS_SECONDS


def end_in_time() -> None:
    """Have the kernel end this process when its time is over, whatever it waits for then. Call it from a signal's handler."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PROCESS_SECONDS)
