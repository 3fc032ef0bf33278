"""Byte-level BPE tokenizers: train, adopt or load one, and encode documents with it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.core.artifact_files import TOKENIZER, TOKENIZER_CONFIG
from service.core.errors import StageInputInvalid

END_OF_TEXT = "<|endoftext|>"

# Usual end-of-document tokens, for a tokenizer.json without its configuration.
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")

# Documents are encoded in blocks of about this many characters, to bound memory.
_BLOCK_CHARACTERS = 1 << 20


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with ``<|endoftext|>`` as id 0.

    Equal texts give equal bytes on any number of cores. The vocabulary is smaller than ``vocab_size`` if the
    texts have too few pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def adopt_tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """Load the ``tokenizer.json`` of a base checkpoint, with the special tokens that its configuration names.

    Raises StageInputInvalid if it cannot be read or has no token that ends a document.
    """
    path = source / TOKENIZER
    if not path.is_file():
        raise StageInputInvalid(f"there is no {TOKENIZER}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise StageInputInvalid(f"{TOKENIZER} cannot be read: {error}") from error
    roles = _special_tokens(source / TOKENIZER_CONFIG)
    if "eos_token" not in roles:
        known = [token for token in _KNOWN_ENDS if tokenizer.token_to_id(token) is not None]
        if not known:
            raise StageInputInvalid(f"{TOKENIZER} has no token that ends a document")
        roles["eos_token"] = known[0]
    unknown = [token for token in roles.values() if tokenizer.token_to_id(token) is None]
    if unknown:
        raise StageInputInvalid(f"{TOKENIZER_CONFIG} names {unknown[0]!r}, which {TOKENIZER} does not have")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


def _special_tokens(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        # An added token is either its text or an object with the text in ``content``.
        values = {role: config.get(role) for role in _ROLES}
        return {
            role: value["content"] if isinstance(value, dict) else str(value)
            for role, value in values.items()
            if value is not None
        }
    except (ValueError, KeyError, AttributeError) as error:
        raise StageInputInvalid(f"{TOKENIZER_CONFIG} cannot be read: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from an artifact that we published."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


class EncodedBlock(NamedTuple):
    """Token ids of some documents, each with its end-of-text token, and the size of their texts in UTF-8."""

    ids: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    documents: int
    text_bytes: int


class TextEncoder:
    """Encodes documents as token ids, with the end-of-text token after each document.

    Text that spells a special token is encoded as ordinary text, so a document cannot fake the end of a
    document.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.end_of_text: int = tokenizer.eos_token_id
        self.vocab_size: int = len(tokenizer)

    def encode(self, texts: Iterable[str]) -> Iterator[EncodedBlock]:
        """Encode in blocks of about a million characters. A document is never split."""
        block: list[str] = []
        characters = 0
        for text in texts:
            block.append(text)
            characters += len(text)
            if characters >= _BLOCK_CHARACTERS:
                yield self._encode_block(block)
                block, characters = [], 0
        if block:
            yield self._encode_block(block)

    def _encode_block(self, texts: list[str]) -> EncodedBlock:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = np.empty(sum(len(encoding) + 1 for encoding in encodings), dtype=np.int64)
        end = 0
        for encoding in encodings:
            start, end = end, end + len(encoding) + 1
            ids[start : end - 1] = encoding.ids
            ids[end - 1] = self.end_of_text
        return EncodedBlock(ids, len(texts), sum(len(text.encode()) for text in texts))
