"""A clock that stands where a test puts it."""


class StillClock:
    """In the place of a module's ``time``."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds
