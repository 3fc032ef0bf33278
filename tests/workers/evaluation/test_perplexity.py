"""The loss of a slice counts every token once, for any length of rows and documents."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from service.core.errors import Stopped
from service.core.stage_specs import Numerics
from tests.support.tiny_export import write_tiny_export
from tests.support.training import texts_of
from workers.data.tokenizer import load_tokenizer
from workers.evaluation import perplexity as module
from workers.evaluation.perplexity import Evaluator, TextLoss, rows_of_stream

LENGTH = 24


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_tiny_export(folder, seed=1)
    return folder


def never() -> bool:
    return False


def naive(export: Path, texts: list[str], length: int) -> tuple[float, int]:
    """The reference: one row and one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    tokenizer = load_tokenizer(export)
    stream = [tokenizer.eos_token_id]
    for text in texts:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    losses = []
    for start in range(0, len(stream) - 1, length):
        row = stream[start : start + length + 1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row[:-1]])).logits[0]
        for position, target in enumerate(row[1:]):
            losses.append(functional.cross_entropy(logits[position], torch.tensor(target)).item())
    return math.fsum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("texts", [["a"], texts_of(5, 7), ["Grüße aus Köln: 5 € für 日本語."] * 3])
def test_the_evaluator_agrees_with_the_naive_computation(
    export: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 3 * LENGTH)  # several batches, the last one partial
    loss, tokens = naive(export, texts, LENGTH)
    measured = Evaluator(export, Numerics(), LENGTH).evaluate(texts, never)
    assert measured is not None
    assert measured.tokens == tokens
    assert measured.loss == pytest.approx(loss, rel=1e-5)
    assert measured.text_bytes == sum(len(text.encode()) for text in texts)
    assert measured.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert measured.bits_per_byte == pytest.approx(
        loss * tokens / math.log(2) / measured.text_bytes, rel=1e-5
    )


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), sequence_length=st.integers(1, 15))
def test_every_token_is_a_target_once(lengths: list[int], sequence_length: int) -> None:
    stream = np.arange(1, sum(lengths) + 1)
    blocks = np.split(stream, np.cumsum(lengths)[:-1])
    rows = list(rows_of_stream(blocks, 0, sequence_length))
    assert np.array_equal(np.concatenate([row[1:] for row in rows]), stream)
    assert np.array_equal(np.concatenate([row[:-1] for row in rows]), stream - 1)
    assert all(len(row) == sequence_length + 1 for row in rows[:-1])


def test_no_documents_have_no_loss(export: Path) -> None:
    assert Evaluator(export, Numerics(), LENGTH).evaluate([], never) is None


def test_an_evaluation_stops_on_request(export: Path) -> None:
    with pytest.raises(Stopped):
        Evaluator(export, Numerics(), LENGTH).evaluate(["a text"], lambda: True)


def test_a_huge_loss_has_infinite_perplexity() -> None:
    assert TextLoss(loss=1e4, tokens=1, text_bytes=1).perplexity == math.inf
