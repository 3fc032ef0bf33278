"""Models built and loaded in several threads at once have all their weights."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoConfig

from tests.support.training import SMALL_CONFIG
from workers.training.pretrained import load_model, new_model

CONFIG = SMALL_CONFIG | {"vocab_size": 320, "max_position_embeddings": 32}


def test_models_built_in_many_threads_at_once_have_their_weights(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        CONFIG["model_type"], **{k: v for k, v in CONFIG.items() if k != "model_type"}
    )
    saved = new_model(config)
    saved.save_pretrained(tmp_path)
    weights = saved.state_dict()

    def build(number: int) -> bool:
        if number % 2:
            loaded = load_model(tmp_path).state_dict()
            return all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
        spread = new_model(config).state_dict()["model.embed_tokens.weight"].std().item()
        return 0.01 < spread < 0.03  # the initialiser's 0.02, unless it was patched out

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(build, range(24)))
