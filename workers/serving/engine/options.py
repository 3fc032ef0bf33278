"""Limits of an engine that its export does not determine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """At most ``max_slots`` sequences run at once, with ``kv_cache_bytes`` for their keys and values.

    The engine accepts a request while fewer than ``max_waiting`` sequences wait. The default, half the slots,
    bounds the wait by half the time that a full batch takes.
    """

    max_slots: int = 16
    kv_cache_bytes: int = 4 << 30
    max_waiting: int = 8


DEFAULTS = EngineOptions()
