"""Builds and loads transformers models, one at a time per process. All models are created here.

While transformers loads a model, it patches torch for the whole process (initialisers that do nothing,
tensors without storage). A model that another thread builds at that moment comes out without weights.
"""

import threading
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_build_lock = threading.Lock()


def new_model(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Build a model with initial weights, drawn from torch's global generator."""
    with _build_lock:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    return model


def load_model(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a model from a folder of safetensors. Never downloads, unpickles or runs code from the folder."""
    with _build_lock:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **options
        )
    return model
