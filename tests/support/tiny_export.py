"""A tiny exported model version: a random two-layer Llama with its own byte-level BPE tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from service.artifacts import Artifacts

CONTEXT_LENGTH = 128
END_OF_TEXT = "<|endoftext|>"
_CORPUS = ["The cat sat on the mat, and the dog sat by the door.", "Grüße aus Köln: 5 € für 日本語."] * 20


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def write_tiny_export(folder: Path, *, seed: int, broken: bool = False, hidden_size: int = 32) -> None:
    """Write an export whose weights depend on ``seed``. A ``broken`` one has weights that are not finite."""
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.3,  # large, so that greedy answers vary and differ between versions
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    if broken:
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish_tiny_export(artifacts: Artifacts, key: str, *, seed: int, broken: bool = False) -> str:
    with artifacts.writing(key) as folder:
        write_tiny_export(folder, seed=seed, broken=broken)
        artifacts.publish(key, folder, {})
    return key
