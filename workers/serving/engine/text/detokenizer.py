"""Converts token ids to text one token at a time, in whole characters.

A character may span several tokens. Byte-level vocabularies are decoded from their exact bytes. Other
vocabularies (SentencePiece and its byte fallback) are decoded in a short sliding window, because a token's
text depends on its neighbours.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_MAX_HELD_TOKENS = 4  # no character has more bytes, so tokens that are still incomplete then are not text


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes map to themselves, others to characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + position): byte for position, byte in enumerate(others)}


class Detokenizer(Protocol):
    """Converts one sequence's tokens to text."""

    def push(self, token: int) -> str:
        """Return the text that the token completes. Incomplete characters are held back."""
        ...

    def flush(self) -> str:
        """Return the text still held back, with U+FFFD for incomplete characters."""
        ...


class Vocabulary:
    """The texts and bytes of a tokenizer's tokens. ``backend`` is a ``tokenizers.Tokenizer``."""

    def __init__(self, backend: Any, decoder_kind: str) -> None:
        self._backend = backend
        self._byte_level = decoder_kind == "ByteLevel"
        self._alphabet = _byte_level_alphabet()
        self._special = {id for id, added in backend.get_added_tokens_decoder().items() if added.special}
        self._raw: dict[int, bytes] = {}

    def raw(self, token: int) -> bytes:
        """Exact bytes of a token.

        A special token has the bytes of its name, although it adds nothing to the text.
        """
        raw = self._raw.get(token)
        if raw is None:
            raw = self._raw[token] = self._token_bytes(token)
        return raw

    def piece(self, token: int) -> str:
        """Display form of one token: its text, or OpenAI's ``bytes:\\xe2\\x82`` for partial characters."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for the tokens that follow ``context``."""
        if self._byte_level:
            return _ByteLevelDetokenizer(self)
        return _WindowDetokenizer(self._decode, list(context)[-_MAX_HELD_TOKENS:])

    def is_special(self, token: int) -> bool:
        return token in self._special

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def _token_bytes(self, token: int) -> bytes:
        name: str | None = self._backend.id_to_token(token)
        if name is None:  # an embedding row without a token
            return b""
        if self._byte_level:
            # Added tokens are stored as plain text, which may contain characters outside the alphabet.
            in_alphabet = all(character in self._alphabet for character in name)
            return bytes(self._alphabet[character] for character in name) if in_alphabet else name.encode()
        fallback = _BYTE_FALLBACK.fullmatch(name)
        return bytes([int(fallback[1], 16)]) if fallback else name.replace("▁", " ").encode()


class _ByteLevelDetokenizer:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        if self._vocabulary.is_special(token):
            return ""
        return self._decoder.decode(self._vocabulary.raw(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """Decodes the tokens shown last together with the new ones; the difference is the new text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], shown: list[int]) -> None:
        self._decode = decode
        self._shown = shown
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._new_text()
        if text.endswith("�") and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(self._new_text())

    def _new_text(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]

    def _show(self, text: str) -> str:
        if self._held and text:
            self._shown, self._held = self._held, []
        return text
