"""From an export's folder to what decodes it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from workers.serving.engine.export_tokenizer import ExportTokenizer
from workers.serving.engine.memory import context_length, this_device
from workers.serving.engine.model_forward import forward_for
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.slot_decoder import SlotDecoder
from workers.training.pretrained import load_model


@torch.inference_mode()
def load_decoder(
    folder: Path, tokenizer: ExportTokenizer, threads: int, options: EngineOptions
) -> SlotDecoder:
    """To be called by the thread that is going to decode: OpenMP keeps a team for every thread that ever computed, and stops
    spinning in all of them where the teams have more threads than there are cores (10 M parameters, two cores: a fifth to
    a quarter less speed).

    Raises as ``TransformersEngine``.
    """
    if threads:
        torch.set_num_threads(threads)
    device = this_device()
    try:
        model: Any = load_model(folder, dtype="auto" if device.type == "cuda" else torch.float32)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    model.to(device).eval()
    config = model.config.get_text_config()
    forward = forward_for(
        model,
        max_slots=options.max_slots,
        slot_tokens=context_length(config),
        kv_cache_bytes=options.kv_cache_bytes,
    )
    return SlotDecoder(
        forward,
        tokenizer.vocabulary(),
        tokenizer.end_tokens(model.generation_config, model.config),
        config.vocab_size,
    )
