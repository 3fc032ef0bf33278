"""Every kind of model is decoded as it decodes by itself, over slots where it can be."""

import time
import weakref
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from workers.serving.engine import packed_llama
from workers.serving.engine.forward import Forward, Piece
from workers.serving.engine.huge_pages import CHUNK_BYTES
from workers.serving.engine.llama_products import Linear, Packed, Strips
from workers.serving.engine.model_forward import forward_for
from workers.serving.engine.packed_linear import can_pack
from workers.serving.engine.packed_llama import PackedLlama, is_packable
from workers.serving.engine.sequence_forward import SequenceForward
from workers.serving.engine.slot_forward import SlotForward
from workers.training.pretrained import new_model

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
LATENT: dict[str, Any] = {  # values are wider than keys
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 12, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 16}
SEQUENCES = [[(7 * number + 3 * position) % 97 for position in range(40)] for number in range(3)]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        yield


def _model(config: PreTrainedConfig) -> Any:
    return new_model(deepcopy(config)).eval()  # a forward writes to its config


def _forward(config: PreTrainedConfig, **options: int) -> tuple[Forward, list[torch.Tensor]]:
    model = _model(config)
    expected = [model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for tokens in SEQUENCES]
    chosen = {"max_slots": 4, "slot_tokens": 64, "kv_cache_bytes": 1 << 24, **options}
    return forward_for(model, **chosen), expected


def _as_the_model(answer: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-3)


def _feed(forward: Forward, *lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Logits of every sequence, fed to a slot each in pieces of such lengths."""
    fed = [0] * len(SEQUENCES)
    answers: list[list[torch.Tensor]] = [[] for _ in SEQUENCES]
    for turn in lengths:
        pieces = [
            Piece(slot, fed[slot], SEQUENCES[slot][fed[slot] : fed[slot] + length], length)
            for slot, length in enumerate(turn)
            if length
        ]
        for piece, logits in zip(pieces, forward(pieces).split([p.num_logits for p in pieces]), strict=True):
            answers[piece.slot].append(logits)
            fed[piece.slot] += len(piece.tokens)
    return [torch.cat(answer) for answer in answers]


CONFIGS: list[tuple[PreTrainedConfig, type[Forward]]] = [
    (LlamaConfig(**SIZES), SlotForward),
    (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), SlotForward),
    (LlamaConfig(**SIZES | {"num_key_value_heads": 4}, head_dim=16), SlotForward),
    (LlamaConfig(**SIZES, rope_parameters=YARN), SlotForward),
    (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64), SlotForward),
    (MistralConfig(**SIZES, sliding_window=8), SlotForward),
    (GemmaConfig(**SIZES, head_dim=8), SlotForward),
    (DeepseekV2Config(**SIZES | LATENT), SlotForward),
    (LlamaConfig(**SIZES, rope_parameters=DYNAMIC), SequenceForward),
]
every_config = pytest.mark.parametrize(
    ("config", "kind"),
    CONFIGS,
    ids=[
        "llama",
        "biases",
        "wide heads",
        "yarn",
        "gpt2",
        "sliding-window",
        "gemma",
        "latent",
        "dynamic-rope",
    ],
)


every_product = pytest.mark.parametrize("products", [Packed, Strips])


@every_product
@every_config
def test_logits_are_those_of_the_model(
    config: PreTrainedConfig, kind: type[Forward], products: type[Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_llama, "faster_products", lambda _: products)
    forward, expected = _forward(config)
    assert isinstance(forward, kind)
    if isinstance(forward, SlotForward) and is_packable(_model(config)) and can_pack():
        assert isinstance(forward._layers, PackedLlama)
        assert isinstance(forward._layers._head, products)
    one_by_one = [(1, 1, 1)] * 20
    for answer, whole in zip(_feed(forward, (5, 1, 20), (3, 9, 0), *one_by_one), expected, strict=True):
        _as_the_model(answer, whole[: len(answer)])


@every_product
@every_config
def test_logits_of_some_rows_of_a_number_that_is_not_compiled_are_theirs(
    config: PreTrainedConfig, kind: type[Forward], products: type[Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 rows and 18 wanted; both are 24 where products are packed."""
    monkeypatch.setattr(packed_llama, "faster_products", lambda _: products)
    forward, expected = _forward(config)
    # Of each sequence: from where, how many tokens, how many logits.
    first = [(0, 11, 10), (0, 5, 5), (0, 4, 3)]
    second = [(11, 12, 12), (5, 7, 5), (4, 1, 1)]
    for turn in (first, second):
        pieces = [
            Piece(slot, begin, SEQUENCES[slot][begin : begin + length], num_logits)
            for slot, (begin, length, num_logits) in enumerate(turn)
        ]
        answers = forward(pieces).split([piece.num_logits for piece in pieces])
        for piece, answer in zip(pieces, answers, strict=True):
            end = piece.begin + len(piece.tokens)
            _as_the_model(answer, expected[piece.slot][end - piece.num_logits : end])
    of_none = forward([Piece(3, 0, SEQUENCES[0][:7], 0)])
    assert of_none.shape == (0, 97)


@pytest.mark.skipif(
    not (can_pack() and torch.backends.mkl.is_available()), reason="this torch leaves no choice of products"
)
@pytest.mark.parametrize(("slow", "chosen"), [(Packed, Strips), (Strips, Packed)])
def test_products_are_those_that_are_faster_here(
    slow: type[Linear], chosen: type[Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    product = slow.added_to

    def slowly(self: Linear, other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        time.sleep(1e-3)
        return product(self, other, x)

    monkeypatch.setattr(slow, "added_to", slowly)
    forward, _ = _forward(LlamaConfig(**SIZES))
    assert isinstance(forward, SlotForward)
    assert isinstance(forward._layers, PackedLlama)
    assert isinstance(forward._layers._head, chosen)


@pytest.mark.skipif(not can_pack(), reason="this torch has no packed products")
def test_what_packed_layers_would_answer_otherwise_goes_through_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed, _ = _forward(LlamaConfig(**SIZES))
    assert isinstance(packed, SlotForward)
    assert isinstance(packed._layers, PackedLlama)
    monkeypatch.setattr(
        PackedLlama, "__call__", lambda self, tokens, positions, wanted, attend: tokens[:, None] * 1.0
    )
    own, expected = _forward(LlamaConfig(**SIZES))
    assert isinstance(own, SlotForward)
    assert own._layers is None
    assert "keeps its layers" in caplog.text
    [answer, *_] = _feed(own, (5, 1, 20))
    _as_the_model(answer, expected[0][:5])


def test_a_subclass_that_may_do_more_is_not_packed() -> None:
    class Other(LlamaForCausalLM):
        pass

    with torch.inference_mode():
        assert is_packable(LlamaForCausalLM(LlamaConfig(**SIZES)))
        assert not is_packable(Other(LlamaConfig(**SIZES)))
        assert not is_packable(LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")))


def test_a_model_that_keeps_another_kind_of_past_is_refused() -> None:
    with pytest.raises(ValueError, match="MambaForCausalLM does not decode with a cache"):
        _forward(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4))


def test_a_copied_beginning_answers_as_the_original() -> None:
    forward, _ = _forward(LlamaConfig(**SIZES))
    original = _feed(forward, (40, 1, 1))[0]
    forward.copy(0, 3, 30)
    copied = forward([Piece(3, 30, SEQUENCES[0][30:], 10)])
    torch.testing.assert_close(copied, original[30:], rtol=0, atol=1e-4)


def test_keys_and_values_lie_in_huge_pages_and_go_when_slots_are_made_anew() -> None:
    forward, _ = _forward(LlamaConfig(**SIZES))
    assert isinstance(forward, SlotForward)
    _feed(forward, (5, 1, 20))
    held = list(forward._held())
    assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == 1
    assert held[0].untyped_storage().nbytes() >= CHUNK_BYTES
    memory = weakref.ref(forward._memory)
    del held
    forward.resize(num_slots=3, slot_tokens=32)
    assert memory() is None


def test_memory_is_bounded_by_fewer_and_then_by_shorter_slots() -> None:
    few, _ = _forward(LlamaConfig(**SIZES))
    assert isinstance(few, SlotForward)
    assert few.bytes_per_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, numbers a head, bytes
    few, _ = _forward(LlamaConfig(**SIZES), kv_cache_bytes=256 * 64 * 2)
    assert (few.num_slots, few.slot_tokens) == (2, 64)
    short, _ = _forward(LlamaConfig(**SIZES), kv_cache_bytes=256 * 40)
    assert (short.num_slots, short.slot_tokens) == (1, 40)
    one_by_one, _ = _forward(LlamaConfig(**SIZES, rope_parameters=DYNAMIC), kv_cache_bytes=256 * 64 * 2)
    assert isinstance(one_by_one, SequenceForward)
    assert (one_by_one.num_slots, one_by_one.slot_tokens) == (2, 64)
