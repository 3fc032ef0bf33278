"""Products are those of the linear layers they are made of, for any number of rows, and of columns that fill no strip."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from workers.serving.engine.huge_pages import CHUNK_BYTES, HugePages
from workers.serving.engine.llama_products import Linear, Packed, Strips
from workers.serving.engine.packed_linear import can_pack

K = 24


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=[Packed, Strips])
def products(request: pytest.FixtureRequest) -> type[Linear]:
    if request.param is Packed and not can_pack():
        pytest.skip("this torch has no packed products")
    kind: type[Linear] = request.param
    return kind


every_shape = pytest.mark.parametrize(
    ("num_rows", "num_columns", "biased"),
    [
        (0, 32, False),
        (1, 97, False),
        (1, 64, True),
        (16, 48, True),
        (16, 64, False),
        (20, 97, True),
        (70, 33, False),
    ],
)


@every_shape
def test_a_product_alone_and_what_it_is_added_to(
    products: type[Linear], num_rows: int, num_columns: int, biased: bool
) -> None:
    layer, x_TK = nn.Linear(K, num_columns, bias=biased), torch.randn(num_rows, K)
    other_TN, expected_TN = torch.randn(num_rows, num_columns), layer(x_TK)
    linear = products(layer.weight, layer.bias, HugePages())
    layer.weight.zero_()  # it has a copy
    torch.testing.assert_close(linear(x_TK), expected_TN)
    before_TN = other_TN.clone()
    torch.testing.assert_close(linear.added_to(other_TN, x_TK), expected_TN + other_TN)
    assert torch.equal(other_TN, before_TN)


@every_shape
def test_one_gated_by_another(products: type[Linear], num_rows: int, num_columns: int, biased: bool) -> None:
    gate, up = (nn.Linear(K, num_columns, bias=biased) for _ in range(2))
    x_TK = torch.randn(num_rows, K)
    gated = products.gated(gate, up, HugePages())
    torch.testing.assert_close(gated(x_TK), silu(gate(x_TK)) * up(x_TK))


def test_strips_lie_in_huge_pages() -> None:
    linear = Strips(torch.randn(48, K), None, HugePages())
    assert linear._weight.untyped_storage().nbytes() >= CHUNK_BYTES
    assert linear._weight.is_contiguous()
