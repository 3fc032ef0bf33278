"""The model that serving is measured with: 10 M parameters, random, with a real tokenizer, in two versions."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.demo.corpus import demo_versions
from workers.data.tokenizer import train_tokenizer

VOCABULARY = 8192
CONTEXT_LENGTH = 512


def write_served_model(folder: Path, *, seed: int) -> None:
    """An export. No token ends its texts, so that every answer is as long as it was asked to be."""
    texts = [document.text for document in demo_versions()[0].documents]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=320,
            intermediate_size=864,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.05,  # wide enough that answers wander
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.save_pretrained(folder)
