"""Every architecture answers as it does by itself, over slots if possible."""

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

from workers.serving.engine.batching.model_runner import ModelRunner, PrefillChunk
from workers.serving.engine.batching.runner_selection import select_runner
from workers.serving.engine.batching.sequence_runner import SequenceRunner
from workers.serving.engine.batching.slot_runner import SlotRunner
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
    return new_model(deepcopy(config)).eval()  # a runner changes its model's config


def _runner(config: PreTrainedConfig, **options: int) -> tuple[ModelRunner, list[torch.Tensor]]:
    model = _model(config)
    expected = [model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for tokens in SEQUENCES]
    chosen = {"max_slots": 4, "slot_tokens": 64, "kv_cache_bytes": 1 << 24, **options}
    return select_runner(model, **chosen), expected


def _assert_close(answer: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-3)


def _feed(runner: ModelRunner, *lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Logits of every sequence, each fed to its own slot in chunks of these lengths."""
    fed = [0] * len(SEQUENCES)
    answers: list[list[torch.Tensor]] = [[] for _ in SEQUENCES]
    for step in lengths:
        chunks = [
            PrefillChunk(slot, fed[slot], SEQUENCES[slot][fed[slot] : fed[slot] + length], length)
            for slot, length in enumerate(step)
            if length
        ]
        for chunk, logits in zip(chunks, runner(chunks).split([p.num_logits for p in chunks]), strict=True):
            answers[chunk.slot].append(logits)
            fed[chunk.slot] += len(chunk.tokens)
    return [torch.cat(answer) for answer in answers]


CONFIGS: list[tuple[PreTrainedConfig, type[ModelRunner]]] = [
    (LlamaConfig(**SIZES), SlotRunner),
    (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), SlotRunner),
    (LlamaConfig(**SIZES | {"num_key_value_heads": 4}, head_dim=16), SlotRunner),
    (LlamaConfig(**SIZES, rope_parameters=YARN), SlotRunner),
    (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64), SlotRunner),
    (MistralConfig(**SIZES, sliding_window=8), SlotRunner),
    (GemmaConfig(**SIZES, head_dim=8), SlotRunner),
    (DeepseekV2Config(**SIZES | LATENT), SlotRunner),
    (LlamaConfig(**SIZES, rope_parameters=DYNAMIC), SequenceRunner),
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
def test_logits_are_those_of_the_model(config: PreTrainedConfig, kind: type[ModelRunner]) -> None:
    runner, expected = _runner(config)
    assert isinstance(runner, kind)
    one_by_one = [(1, 1, 1)] * 20
    for answer, whole in zip(_feed(runner, (5, 1, 20), (3, 9, 0), *one_by_one), expected, strict=True):
        _assert_close(answer, whole[: len(answer)])


@every_config
def test_a_chunk_may_want_the_logits_of_its_last_tokens_only(
    config: PreTrainedConfig, kind: type[ModelRunner]
) -> None:
    """20 rows are fed, and logits of 18 are wanted."""
    runner, expected = _runner(config)
    # Of each sequence: begin, number of tokens, number of logits.
    first = [(0, 11, 10), (0, 5, 5), (0, 4, 3)]
    second = [(11, 12, 12), (5, 7, 5), (4, 1, 1)]
    for step in (first, second):
        chunks = [
            PrefillChunk(slot, begin, SEQUENCES[slot][begin : begin + length], num_logits)
            for slot, (begin, length, num_logits) in enumerate(step)
        ]
        answers = runner(chunks).split([chunk.num_logits for chunk in chunks])
        for chunk, answer in zip(chunks, answers, strict=True):
            end = chunk.begin + len(chunk.tokens)
            _assert_close(answer, expected[chunk.slot][end - chunk.num_logits : end])
    without_logits = runner([PrefillChunk(3, 0, SEQUENCES[0][:7], 0)])
    assert without_logits.shape == (0, 97)


def test_a_model_without_a_kv_cache_is_rejected() -> None:
    with pytest.raises(ValueError, match="MambaForCausalLM does not decode with a KV cache"):
        _runner(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4))


def test_a_copied_prefix_answers_like_the_original() -> None:
    runner, _ = _runner(LlamaConfig(**SIZES))
    original = _feed(runner, (40, 1, 1))[0]
    runner.copy(0, 3, 30)
    copied = runner([PrefillChunk(3, 30, SEQUENCES[0][30:], 10)])
    torch.testing.assert_close(copied, original[30:], rtol=0, atol=1e-4)


def test_less_cache_memory_means_fewer_and_then_shorter_slots() -> None:
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, numbers a head, bytes a number
    few, _ = _runner(LlamaConfig(**SIZES), kv_cache_bytes=token_bytes * 64 * 2)
    assert (few.num_slots, few.slot_tokens) == (2, 64)
    short, _ = _runner(LlamaConfig(**SIZES), kv_cache_bytes=token_bytes * 40)
    assert (short.num_slots, short.slot_tokens) == (1, 40)
    one_by_one, _ = _runner(
        LlamaConfig(**SIZES, rope_parameters=DYNAMIC), kv_cache_bytes=token_bytes * 64 * 2
    )
    assert isinstance(one_by_one, SequenceRunner)
    assert (one_by_one.num_slots, one_by_one.slot_tokens) == (2, 64)
