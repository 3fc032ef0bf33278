"""Models for the serving benchmark: random weights and a real tokenizer, 10 M parameters, and 107 M for GPUs."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.demo.corpus import demo_versions
from workers.data.tokenizer import train_tokenizer

VOCABULARY = 8192
CONTEXT_LENGTH = 512
SMALL = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
}
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


def write_served_model(
    folder: Path, *, seed: int, shape: dict[str, Any] = SMALL, dtype: torch.dtype = torch.float32
) -> None:
    """Write an export. It has no end-of-text token, so every answer has exactly the requested length."""
    texts = [document.text for document in demo_versions()[0].documents]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            **shape,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.05,  # wide enough for varied answers
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.to(dtype=dtype)  # type: ignore[call-arg]
    model.save_pretrained(folder)
