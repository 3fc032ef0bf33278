"""What a line has forgotten: the measures of every version on every slice, and its backward transfer.

Backward transfer is the mean change of the loss on old slices. Lopez-Paz & Ranzato 2017 (GEM, arXiv
1706.08840) define it on accuracy, where forgetting is negative. A loss turns the sign: negative means that
the line got better on old text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from service.core.json_floats import finite_or_none

Matrix = tuple[tuple[float | None, ...], ...]


class Measure(StrEnum):
    """A measure of a version on a slice. Lower is better."""

    LOSS = "loss"  # in nats per token
    PERPLEXITY = "perplexity"
    BITS_PER_BYTE = "bits_per_byte"


@dataclass(frozen=True)
class MeasuredVersion:
    """A version and its ``evaluations``: slice name -> measure -> value.

    A ``one_off`` version is not part of the line.
    """

    number: int
    data_version: int
    evaluations: Mapping[str, Mapping[str, float | None]]
    one_off: bool = False

    def on(self, slice_name: str, measure: Measure) -> float | None:
        """The value on a slice; None if it was not measured or is not finite."""
        return finite_or_none(self.evaluations.get(slice_name, {}).get(measure))


@dataclass(frozen=True)
class Forgetting:
    """Matrices with a row per version and a column per slice, and the backward transfer of each version."""

    slices: tuple[str, ...]
    versions: tuple[int, ...]
    loss: Matrix
    perplexity: Matrix
    bits_per_byte: Matrix
    backward_transfers: tuple[float | None, ...]

    @property
    def backward_transfer(self) -> float | None:
        """The backward transfer of the newest version."""
        return self.backward_transfers[-1] if self.backward_transfers else None

    def backward_transfer_of(self, number: int) -> float | None:
        return self.backward_transfers[self.versions.index(number)]


def forgetting(versions: Sequence[MeasuredVersion], slices: Mapping[str, int | None]) -> Forgetting:
    """Compute the matrices.

    ``versions`` are in order of number; ``slices`` maps each name to its data version, if any.
    """
    return Forgetting(
        slices=tuple(slices),
        versions=tuple(version.number for version in versions),
        loss=_matrix(versions, slices, Measure.LOSS),
        perplexity=_matrix(versions, slices, Measure.PERPLEXITY),
        bits_per_byte=_matrix(versions, slices, Measure.BITS_PER_BYTE),
        backward_transfers=backward_transfers(versions, slices),
    )


def backward_transfers(
    versions: Iterable[MeasuredVersion], slices: Mapping[str, int | None]
) -> tuple[float | None, ...]:
    """For every version, the mean of (loss now - loss when new) over old slices, in nats per token.

    A slice is old if its data version is older than the model version's own. It was new to the line's first
    version (by number) for the slice's data version or a later one; that version itself counts no change for
    it. None if no old slice has both losses.
    """
    of_data = {name: number for name, number in slices.items() if number is not None}
    when_new: dict[str, float | None] = {}
    transfers: list[float | None] = []
    for version in versions:
        losses = {name: version.on(name, Measure.LOSS) for name in of_data}
        changes = [
            loss - before
            for name, loss in losses.items()
            if of_data[name] < version.data_version
            and loss is not None
            and (before := when_new.get(name)) is not None
        ]
        transfers.append(math.fsum(changes) / len(changes) if changes else None)
        if not version.one_off:
            for name, loss in losses.items():
                if of_data[name] <= version.data_version:
                    when_new.setdefault(name, loss)
    return tuple(transfers)


def _matrix(versions: Iterable[MeasuredVersion], slices: Iterable[str], measure: Measure) -> Matrix:
    return tuple(tuple(version.on(name, measure) for name in slices) for version in versions)
