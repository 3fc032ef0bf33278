"""The tokenizer of an export: prompts to ids, and what ids read as and mean."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from workers.serving.engine.chat_template import PLAIN_STOP, render_chat
from workers.serving.engine.detokenizer import Vocabulary
from workers.serving.generation import Chat


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

    def encode(self, text: str) -> tuple[int, ...]:
        """See ``Engine.encode``."""
        ids = tuple(self._backend.encode(text, add_special_tokens=True).ids)
        return ids or (self._beginning(),)

    def encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """See ``Engine.encode_chat``."""
        text = render_chat(self._tokenizer, chat)
        if self._tokenizer.chat_template is None:
            return self.encode(text), PLAIN_STOP
        # A template of the tokenizer's own writes the special tokens itself.
        return tuple(self._backend.encode(text, add_special_tokens=False).ids), ()

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self._backend, type(self._backend.decoder).__name__)

    def end_tokens(self, generation_config: Any, config: Any) -> frozenset[int]:
        """Every token that ends a text, by the generation config, the model's config or the tokenizer."""
        ends: set[int] = set()
        for source in (generation_config, config, self._tokenizer):
            value = getattr(source, "eos_token_id", None)
            ends.update([value] if isinstance(value, int) else value or [])
        return frozenset(ends)

    def _beginning(self) -> int:
        """The token an empty prompt stands for."""
        for id in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if id is not None:
                return int(id)
        return 0
