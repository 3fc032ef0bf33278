"""The one door to transformers' models. They are built and loaded one at a time in a process.

While it loads one, transformers patches torch for the whole process (initialisers that do nothing, tensors without
storage). A second model that is made in another thread meanwhile has been seen to come out without its weights.
"""

import threading
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_making = threading.Lock()


def new_model(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model with initial weights, drawn from torch's global generator."""
    with _making:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    return model


def load_model(folder: Path, **options: Any) -> PreTrainedModel:
    """A model from a folder of safetensors: nothing is fetched, and no pickle and no code from outside is ever read."""
    with _making:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **options
        )
    return model
