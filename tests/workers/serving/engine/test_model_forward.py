"""Every kind of model is decoded as it decodes by itself, over slots where it can be."""

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
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from workers.pretrained import new_model
from workers.serving.engine.forward import Forward, Piece
from workers.serving.engine.model_forward import forward_for
from workers.serving.engine.sequence_forward import SequenceForward
from workers.serving.engine.slot_forward import SlotForward

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


@every_config
def test_logits_are_those_of_the_model(config: PreTrainedConfig, kind: type[Forward]) -> None:
    forward, expected = _forward(config)
    assert isinstance(forward, kind)
    one_by_one = [(1, 1, 1)] * 20
    for answer, whole in zip(_feed(forward, (5, 1, 20), (3, 9, 0), *one_by_one), expected, strict=True):
        _as_the_model(answer, whole[: len(answer)])


@every_config
def test_logits_of_some_rows_are_theirs(config: PreTrainedConfig, kind: type[Forward]) -> None:
    """20 rows are fed, and logits of 18 are wanted."""
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


def test_a_model_that_keeps_another_kind_of_past_is_refused() -> None:
    with pytest.raises(ValueError, match="MambaForCausalLM does not decode with a cache"):
        _forward(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4))


def test_a_copied_beginning_answers_as_the_original() -> None:
    forward, _ = _forward(LlamaConfig(**SIZES))
    original = _feed(forward, (40, 1, 1))[0]
    forward.copy(0, 3, 30)
    copied = forward([Piece(3, 30, SEQUENCES[0][30:], 10)])
    torch.testing.assert_close(copied, original[30:], rtol=0, atol=1e-4)


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
