"""PRESETS maps a name to a transformers configuration without dropout. A new preset is one line."""

from collections.abc import Callable, Mapping

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

Preset = Callable[[int, int], PreTrainedConfig]  # (vocabulary, sequence length) -> configuration


def rotary_positions(sequence_length: int) -> int:
    """Context length of a model with rotary positions, which is served past the length it is trained at.

    Rotary positions (Su et al. 2021, arXiv 2104.09864) have no weights, so a generous limit costs nothing.
    Quality falls past the trained length.
    """
    return max(4 * sequence_length, 512)


def _llama(
    hidden: int, layers: int, heads: int, key_value_heads: int, intermediate: int, tied: bool
) -> Preset:
    def config(vocab_size: int, sequence_length: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=rotary_positions(sequence_length),
            tie_word_embeddings=tied,
            attention_dropout=0.0,
        )

    return config


def _gpt2(hidden: int, layers: int, heads: int) -> Preset:
    def config(vocab_size: int, sequence_length: int) -> GPT2Config:
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            n_positions=sequence_length,  # learned positions beyond it would keep random weights
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )

    return config


# Parameter counts assume vocabularies of 4,096 (tiny), 8,192 (7m), 32,000 (other Llamas), 50,257 (GPT-2).
PRESETS: Mapping[str, Preset] = {
    "tiny": _llama(128, 4, 4, 4, 352, tied=True),  # 1.3 M
    "llama-7m": _llama(256, 6, 4, 4, 768, tied=True),  # 7.2 M
    "llama-42m": _llama(512, 8, 8, 8, 1408, tied=True),  # 42 M
    "gpt2-124m": _gpt2(768, 12, 12),  # 124 M
    "llama-360m": _llama(1024, 24, 16, 16, 2816, tied=False),  # 374 M
    "llama-1.2b": _llama(2048, 24, 32, 4, 5632, tied=False),  # 1,188 M
}
