"""Tokens become text in whole characters."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from tests.support.tiny_export import byte_level_tokenizer
from workers.serving.engine.text.detokenizer import Detokenizer, Vocabulary


@pytest.fixture(scope="module")
def backend() -> Any:
    return byte_level_tokenizer().backend_tokenizer


def byte_fallback_backend() -> Tokenizer:
    """A tokenizer like SentencePiece's: words with ▁, and a token for every byte."""
    words = ["▁", "▁a", "b", "▁cat", "s"]
    vocab = {
        token: id for id, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _id(backend: Tokenizer, token: str) -> int:
    id = backend.token_to_id(token)
    assert id is not None
    return id


def deltas(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


def byte_tokens(backend: Any, text: str) -> list[int]:
    """One token per byte of the text, so that multi-byte characters are split."""
    vocabulary = Vocabulary(backend, "ByteLevel")
    single = {
        vocabulary.raw(id): id for id in range(backend.get_vocab_size()) if len(vocabulary.raw(id)) == 1
    }
    return [single[bytes([byte])] for byte in text.encode()]


def test_a_character_split_over_tokens_is_shown_when_it_is_whole(backend: Any) -> None:
    detokenizer = Vocabulary(backend, "ByteLevel").detokenizer()
    assert deltas(detokenizer, byte_tokens(backend, "a€b")) == ["a", "", "", "€", "b", ""]


def test_an_incomplete_character_is_flushed_as_a_replacement(backend: Any) -> None:
    detokenizer = Vocabulary(backend, "ByteLevel").detokenizer()
    assert deltas(detokenizer, byte_tokens(backend, "a€")[:-1]) == ["a", "", "", "�"]


def test_deltas_add_up_to_the_decoded_text(backend: Any) -> None:
    draw = random.Random(0)
    for _ in range(300):
        tokens = [draw.randrange(backend.get_vocab_size()) for _ in range(draw.randrange(30))]
        shown = "".join(deltas(Vocabulary(backend, "ByteLevel").detokenizer(), tokens))
        assert shown == backend.decode(tokens, skip_special_tokens=True)


def test_byte_fallback_tokens_add_up_to_the_text() -> None:
    backend = byte_fallback_backend()
    vocabulary = Vocabulary(backend, "Sequence")
    tokens = backend.encode("a cats 日本 €b").ids
    detokenizer = vocabulary.detokenizer()
    shown = deltas(detokenizer, tokens)
    assert "".join(shown) == "a cats 日本 €b"
    assert all("�" not in text for text in shown)


def test_a_continuation_keeps_its_leading_space() -> None:
    backend = byte_fallback_backend()
    vocabulary = Vocabulary(backend, "Sequence")
    a, cat = _id(backend, "▁a"), _id(backend, "▁cat")
    assert deltas(vocabulary.detokenizer([a]), [cat]) == [" cat", ""]
    assert deltas(vocabulary.detokenizer(), [cat]) == ["cat", ""]


def test_invalid_bytes_do_not_block_a_stream() -> None:
    backend = byte_fallback_backend()
    continuation_byte = _id(backend, "<0x80>")
    shown = deltas(Vocabulary(backend, "Sequence").detokenizer(), [continuation_byte] * 12)
    assert "".join(shown) == "�" * 12
    assert shown[3] == "����"


def test_partial_characters_are_displayed_as_bytes(backend: Any) -> None:
    vocabulary = Vocabulary(backend, "ByteLevel")
    first, *_ = byte_tokens(backend, "€")
    assert vocabulary.piece(first) == "bytes:\\xe2"
    assert vocabulary.raw(first) == b"\xe2"
    fallback = Vocabulary(byte_fallback_backend(), "Sequence")
    assert fallback.raw(1 + 0xE2) == b"\xe2"
