"""The tokenizer of an export: prompts to ids, and what ids read as and mean."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from workers.serving.engine.chat_template import PLAIN_STOP, render_chat
from workers.serving.engine.detokenizer import Vocabulary
from workers.serving.generation import Chat

# Text is several characters a token; where so many are already too many tokens, nobody need read on.
CHARACTERS_PER_TOKEN = 32


class ExportTokenizer:
    """Raises OSError or ValueError for a folder without one. No network, no code from the folder."""

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
        return self._ids(text, context_length, add_special_tokens=True) or (self._beginning(),)

    def encode_chat(self, chat: Chat, context_length: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """See ``Engine.encode_chat``."""
        text = render_chat(self._tokenizer, chat)
        if self._tokenizer.chat_template is None:
            return self.encode(text, context_length), PLAIN_STOP
        # A template of the tokenizer's own writes the special tokens itself.
        return self._ids(text, context_length, add_special_tokens=False), ()

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self._backend, type(self._backend.decoder).__name__)

    def end_tokens(self, generation_config: Any, config: Any) -> frozenset[int]:
        """Every token that ends a text, by the generation config, the model's config or the tokenizer."""
        ends: set[int] = set()
        for source in (generation_config, config, self._tokenizer):
            value = getattr(source, "eos_token_id", None)
            ends.update([value] if isinstance(value, int) else value or [])
        return frozenset(ends)

    def _ids(self, text: str, context_length: int, *, add_special_tokens: bool) -> tuple[int, ...]:
        beginning = text[: CHARACTERS_PER_TOKEN * context_length]
        ids = tuple(self._backend.encode(beginning, add_special_tokens=add_special_tokens).ids)
        # Where a text is cut, more tokens may come of it than of the whole: hence twice as many.
        if len(beginning) == len(text) or len(ids) > 2 * context_length:
            return ids
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def _beginning(self) -> int:
        """The token an empty prompt stands for."""
        for id in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if id is not None:
                return int(id)
        return 0
