"""The matrices and backward transfer, from hand-made numbers."""

import math

import pytest

from service.core.forgetting import Measure, MeasuredVersion, backward_transfers, forgetting

SLICES = {"v1": 1, "v2": 2, "v3": 3}


def version(number: int, data_version: int, one_off: bool = False, **losses: float | None) -> MeasuredVersion:
    return MeasuredVersion(
        number, data_version, {name: {Measure.LOSS: loss} for name, loss in losses.items()}, one_off
    )


def test_each_measure_has_a_matrix_with_a_row_per_version_and_a_column_per_slice() -> None:
    def all_three(loss: float) -> dict[str, float | None]:
        return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 4}

    found = forgetting(
        [
            MeasuredVersion(1, 1, {"v1": all_three(4.0)}),
            MeasuredVersion(2, 2, {"v1": all_three(4.5), "v2": all_three(2.0)}),
        ],
        {"v1": 1, "v2": 2},
    )
    assert (found.slices, found.versions) == (("v1", "v2"), (1, 2))
    assert found.loss == ((4.0, None), (4.5, 2.0))
    assert found.perplexity == ((math.exp(4.0), None), (math.exp(4.5), math.exp(2.0)))
    assert found.bits_per_byte == ((1.0, None), (1.125, 0.5))
    assert found.backward_transfers == (None, 0.5)
    assert found.backward_transfer == 0.5
    assert found.backward_transfer_of(1) is None


def test_a_model_without_versions_has_empty_matrices() -> None:
    found = forgetting([], {})
    assert (found.slices, found.versions, found.loss, found.backward_transfers) == ((), (), (), ())
    assert found.backward_transfer is None


def test_a_value_that_is_not_finite_is_none() -> None:
    evaluations = {"v1": {"loss": 800.0, "perplexity": math.inf, "bits_per_byte": math.nan}}
    found = forgetting([MeasuredVersion(1, 1, evaluations)], {"v1": 1})
    assert (found.loss, found.perplexity, found.bits_per_byte) == (((800.0,),), ((None,),), ((None,),))


def test_backward_transfer_is_the_mean_change_since_each_slice_was_new() -> None:
    versions = [
        version(1, 1, v1=4.0, v2=9.0),  # measured on v2 before training on it, so v2 was not new then
        version(2, 2, v1=4.5, v2=3.0),
        version(3, 3, v1=4.1, v2=2.5, v3=2.0),
    ]
    transfers = backward_transfers(versions, SLICES)
    assert transfers[:2] == (None, 0.5)
    assert transfers[2] == pytest.approx((0.1 - 0.5) / 2)


def test_backward_transfer_is_negative_if_old_text_improves() -> None:
    assert backward_transfers([version(1, 1, v1=4.0), version(2, 2, v1=3.0)], SLICES) == (None, -1.0)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_slice_without_both_losses_is_left_out_of_the_mean(loss: float | None) -> None:
    now = [version(1, 1, v1=4.0), version(2, 2, v1=4.5, v2=3.0), version(3, 3, v1=loss, v2=3.25)]
    assert backward_transfers(now, SLICES)[2] == 0.25
    when_new = [version(1, 1, v1=loss), version(2, 2, v1=4.5, v2=3.0), version(3, 3, v1=4.0, v2=3.25)]
    assert backward_transfers(when_new, SLICES) == (None, None, 0.25)


def test_a_slice_that_was_not_measured_is_left_out_of_the_mean() -> None:
    versions = [version(1, 1), version(2, 2, v1=4.5, v2=3.0), version(3, 3, v2=3.25)]
    assert backward_transfers(versions, SLICES) == (None, None, 0.25)


def test_slices_without_a_data_version_are_ignored() -> None:
    versions = [version(1, 1, v1=4.0, suite=1.0), version(2, 2, v1=4.5, suite=9.0)]
    assert backward_transfers(versions, {"v1": 1, "suite": None}) == (None, 0.5)
    assert backward_transfers(versions, {"suite": None}) == (None, None)


def test_an_uploaded_slice_of_a_data_version_counts_like_its_holdout() -> None:
    versions = [version(1, 1, v1=4.0, uploaded=2.0), version(2, 2, v1=4.5, uploaded=2.0)]
    assert backward_transfers(versions, {"v1": 1, "uploaded": 1}) == (None, 0.25)


def test_a_slice_was_new_to_the_first_of_several_versions_for_its_data_version() -> None:
    versions = [version(1, 1, v1=4.0), version(2, 1, v1=3.0), version(3, 2, v1=4.25)]
    # A second version for the same data has no older slice of its own.
    assert backward_transfers(versions, SLICES) == (None, None, 0.25)


def test_a_slice_without_a_version_of_its_own_was_new_to_the_next_version() -> None:
    versions = [version(1, 1, v1=4.0), version(2, 3, v1=4.5, v2=3.0, v3=2.0), version(3, 4, v1=4.0, v2=3.5)]
    # For the version to which v2 was new, v2 has no change, rather than a change of zero.
    assert backward_transfers(versions, SLICES) == (None, 0.5, 0.25)


def test_a_first_version_has_no_backward_transfer() -> None:
    assert backward_transfers([version(1, 3, v1=4.0, v2=3.0, v3=2.0)], SLICES) == (None,)


def test_a_version_for_older_data_is_compared_on_even_older_slices() -> None:
    versions = [version(1, 1, v1=4.0), version(2, 3, v1=4.5, v2=3.0), version(3, 2, v1=4.25, v2=9.0)]
    assert backward_transfers(versions, SLICES)[2] == 0.25


def test_a_one_off_version_is_measured_but_sets_no_reference_for_the_line() -> None:
    versions = [
        version(1, 1, v1=4.0),
        version(2, 2, one_off=True, v1=4.75, v2=9.0),
        version(3, 2, v1=4.5, v2=3.0),
        version(4, 3, v1=4.0, v2=3.5),
    ]
    assert backward_transfers(versions, SLICES) == (None, 0.75, 0.5, 0.25)
