"""The keys and values of one layer, by slot."""

from torch import Tensor

MAX_VIEWS = 256  # cached per layer


class KVCachePool:
    """Holds keys (S, G, L, D) and values (S, G, L, E) of S slots with L tokens each, all zero at first.

    Masked positions are multiplied by zero, so they must be finite from the start.
    """

    def __init__(self, num_slots: int, slot_tokens: int, key_TGD: Tensor, value_TGE: Tensor) -> None:
        """The first keys and values of the layer determine the shapes and the type."""
        # Zeros are written, not mapped lazily: free memory is checked before the next version is loaded.
        self.keys, self.values = (
            like.new_empty(num_slots, like.shape[1], slot_tokens, like.shape[2]).zero_()
            for like in (key_TGD, value_TGE)
        )
        self.bytes_per_token = key_TGD[0].nbytes + value_TGE[0].nbytes
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def write(self, slots_T: Tensor, positions_T: Tensor, key_TGD: Tensor, value_TGE: Tensor) -> None:
        """Store one key and value for each slot and position."""
        self.keys[slots_T, :, positions_T] = key_TGD
        self.values[slots_T, :, positions_T] = value_TGE

    def view(self, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` keys and values of adjacent slots.

        Views are cached because consecutive steps mostly ask for the same ones; creating them again would
        cost a tenth of the attention time.
        """
        key = (slots.start, slots.stop, length)
        views = self._views.get(key)
        if views is None:
            if len(self._views) == MAX_VIEWS:
                self._views.clear()
            views = self._views[key] = (self.keys[slots, :, :length], self.values[slots, :, :length])
        return views

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        for cache in (self.keys, self.values):
            cache[target, :, :num_tokens] = cache[source, :, :num_tokens]

    def clear(self, slot: int) -> None:
        for cache in (self.keys, self.values):
            cache[slot].zero_()


def num_slots_and_tokens(
    max_slots: int, slot_tokens: int, kv_cache_bytes: int, bytes_per_token: int
) -> tuple[int, int]:
    """Fit the cache into ``kv_cache_bytes``: fewer slots first, then shorter ones."""
    num_tokens = kv_cache_bytes // max(bytes_per_token, 1)
    return max(1, min(max_slots, num_tokens // slot_tokens)), min(slot_tokens, num_tokens)
