"""The tokenizer of an export: encodes prompts and describes the vocabulary."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from workers.serving.engine.text.chat_template import PLAIN_STOP, render_chat
from workers.serving.engine.text.detokenizer import Vocabulary
from workers.serving.generation import Chat

# A token is rarely this long. If this much text already exceeds the context, the rest need not be read.
CHARACTERS_PER_TOKEN = 32


class ExportTokenizer:
    """Loads the tokenizer in ``folder`` without network access and without running code from the folder.

    Raises OSError or ValueError if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self._backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise ValueError(f"{folder}: no tokenizer.json")
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, text: str, context_length: int) -> tuple[int, ...]:
        """See ``Engine.encode``."""
        return self._ids(text, context_length, add_special_tokens=True) or (self._start_token(),)

    def encode_chat(self, chat: Chat, context_length: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """See ``Engine.encode_chat``."""
        text = render_chat(self._tokenizer, chat)
        if self._tokenizer.chat_template is None:
            return self.encode(text, context_length), PLAIN_STOP
        # The tokenizer's own template writes the special tokens itself.
        return self._ids(text, context_length, add_special_tokens=False), ()

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self._backend, type(self._backend.decoder).__name__)

    def end_tokens(self, generation_config: Any, config: Any) -> frozenset[int]:
        """All tokens that end a text according to the generation or model config or the tokenizer."""
        ends: set[int] = set()
        for source in (generation_config, config, self._tokenizer):
            value = getattr(source, "eos_token_id", None)
            ends.update([value] if isinstance(value, int) else value or [])
        return frozenset(ends)

    def _ids(self, text: str, context_length: int, *, add_special_tokens: bool) -> tuple[int, ...]:
        prefix = text[: CHARACTERS_PER_TOKEN * context_length]
        ids = tuple(self._backend.encode(prefix, add_special_tokens=add_special_tokens).ids)
        # A cut text can have more tokens than the same part of the whole, hence the factor of two.
        if len(prefix) == len(text) or len(ids) > 2 * context_length:
            return ids
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def _start_token(self) -> int:
        """The token that stands for an empty prompt."""
        for id in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if id is not None:
                return int(id)
        return 0
