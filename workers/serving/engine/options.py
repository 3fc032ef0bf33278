"""What engines are given beside the export."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """At most ``max_slots`` sequences at once, in ``kv_cache_bytes`` of keys and values. A request is taken while fewer than
    ``max_waiting`` sequences wait: with half as many as there are slots, nobody waits for more than half a round.
    """

    max_slots: int = 16
    kv_cache_bytes: int = 4 << 30
    max_waiting: int = 8


DEFAULTS = EngineOptions()
