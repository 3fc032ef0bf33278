"""A clock that only moves when a test sets it."""


class StillClock:
    """Replaces the ``time`` module in the code under test."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds
