"""The formula, by hand."""

from service.core.costs import training_flops


def test_training_flops_are_six_per_parameter_and_token_and_half_of_attention() -> None:
    flops = training_flops(non_embedding=100, output_head=50, layers=2, hidden=8, context=16, tokens=10)
    assert flops == 6 * 150 * 10 + 12 * 2 * 8 * 16 * 10 / 2
