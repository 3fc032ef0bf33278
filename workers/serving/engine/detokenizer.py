"""Token ids to text, a token at a time: whole characters only, and nothing of a stop string.

A character may span several tokens. Byte-level vocabularies are decoded from their exact bytes; others
(SentencePiece and its byte fallback) by decoding a short window again, since what a token reads as depends on
its neighbours.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_MAX_HELD_TOKENS = 4  # no character has more bytes, so whatever is still incomplete then is not text


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (GPT-2): itself if printable, else one from
    256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + position): byte for position, byte in enumerate(others)}


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """Text that the token completes; what is incomplete is held for the next."""
        ...

    def flush(self) -> str:
        """What is still held, with U+FFFD for what never became a character."""
        ...


class Vocabulary:
    """What the tokens of one tokenizer (a ``tokenizers.Tokenizer``) read as, and detokenizers for it."""

    def __init__(self, backend: Any, decoder_kind: str) -> None:
        self._backend = backend
        self._byte_level = decoder_kind == "ByteLevel"
        self._alphabet = _byte_level_alphabet()
        self._special = {id for id, added in backend.get_added_tokens_decoder().items() if added.special}
        self._raw: dict[int, bytes] = {}

    def raw(self, token: int) -> bytes:
        """Exact bytes of a token. A special token has its name's, though it adds nothing to the text."""
        known = self._raw.get(token)
        if known is None:
            known = self._raw[token] = self._spell(token)
        return known

    def piece(self, token: int) -> str:
        """How a token is shown on its own; one that is not whole characters as OpenAI does,
        ``bytes:\\xe2\\x82``.
        """
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for what follows ``context``."""
        if self._byte_level:
            return _ByteLevelDetokenizer(self)
        return _WindowDetokenizer(self._decode, list(context)[-_MAX_HELD_TOKENS:])

    def is_special(self, token: int) -> bool:
        return token in self._special

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def _spell(self, token: int) -> bytes:
        name: str | None = self._backend.id_to_token(token)
        if name is None:  # an embedding row without a token
            return b""
        if self._byte_level:
            # Added tokens are stored as plain text: what the alphabet does not know is taken as it is.
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
    """Decodes what was shown last together with what is new; the difference is the new text."""

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


class StopStrings:
    """Holds back text that may be the beginning of a stop string; ``hit`` once one is complete."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Text that may be shown; after a hit, what came before the stop string."""
        if not self._stop:
            return text
        self._held += text
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
