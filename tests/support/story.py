"""Pushes data versions over HTTP and waits for the released versions of a small model, as a user would."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from api.schemas.models import ModelVersion
from service.core.executor import Executor
from service.core.serving import Serving
from service.core.states import UpdateState
from tests.support.control_plane import ControlPlane
from tests.support.training import SMALL_CONFIG, texts_of

DATASET = "d"
SPEC: dict[str, Any] = {
    "name": "m",
    "dataset": DATASET,
    "architecture": {"config": SMALL_CONFIG},
    "tokenizer": {"train": {"vocab_size": 320}},
    "training": {"sequence_length": 32, "batch_tokens": 256, "peak_lr": 3e-3, "warmup_steps": 3},
    "gate": {"max_new_loss_increase": 5, "max_old_loss_increase": 5},
}
DOCUMENTS = 60


def push_and_release(
    plane: ControlPlane, number: int, executor: Executor, serving: Serving, model: str = "m"
) -> ModelVersion:
    """Push data version ``number`` and run its updates to the end. Returns the version served then."""
    plane.push(DATASET, *texts_of(number, DOCUMENTS)).raise_for_status()
    return released(plane, executor, serving, model)


def released(plane: ControlPlane, executor: Executor, serving: Serving, model: str) -> ModelVersion:
    """Run the model's remaining updates to the end. Returns the version served then."""
    plane.finish(model, executor, serving)
    for update in plane.client.updates(model):
        assert update.state == UpdateState.SUCCEEDED, update.error
    return plane.client.model_version(model, "served")


def download(plane: ControlPlane, version: ModelVersion, folder: Path) -> Path:
    """Download all files of the version's export over HTTP. Returns ``folder``."""
    for file in version.artifact.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        plane.client.download(version.model, version.number, file.path, target)
    return folder


def greedy(export: Path, prompt: str, tokens: int) -> str:
    """Generate greedily from an export with transformers."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
