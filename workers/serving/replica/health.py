"""When an engine counts as dead or hung."""

from workers.serving.engine.port import EngineStatus

MIN_HANG_SECONDS = 10.0
HANG_FACTOR = 10.0  # times the engine's longest step so far


def unhealthy_reason(status: EngineStatus, hang_seconds: float) -> str | None:
    """Say why an engine must be replaced; None if it is healthy.

    A step may take ``HANG_FACTOR`` times as long as the longest one before it, but no longer than
    ``hang_seconds``.
    """
    if not status.alive:
        return "the engine has died"
    limit = min(max(MIN_HANG_SECONDS, HANG_FACTOR * status.longest_step_seconds), hang_seconds)
    if status.stalled_seconds > limit:
        return f"the engine has hung for {status.stalled_seconds:.0f} s"
    return None
