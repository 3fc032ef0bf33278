"""A whole update in one process, with real stages and a real server: from pushed data to a served version."""

from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from tests.story.conftest import NewPlane, Workers
from tests.support.story import SPEC, download, greedy, push_and_release, released
from workers.serving.local_serving import LocalServing

PROMPT = "1 a"


def answer(serving: LocalServing, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    response = httpx.post(f"{serving.url()}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200
    document: dict[str, Any] = response.json()
    return document


@pytest.mark.slow_on_postgres
def test_two_data_versions_become_served_versions_and_equal_runs_give_equal_bits(
    new_plane: NewPlane, workers: Workers
) -> None:
    runs = []
    for _ in range(2):
        plane = new_plane()
        executor, serving = workers(plane)
        plane.client.create_model(SPEC)
        versions = []
        for number in (1, 2):
            version = push_and_release(plane, number, executor, serving)
            assert version.number == version.data_version == number
            assert answer(serving, "m")["system_fingerprint"] == f"m@{number}"
            versions.append((version.artifact.sha256, version.evaluations))
        runs.append(versions)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_a_line_starts_from_a_base_checkpoint(new_plane: NewPlane, workers: Workers) -> None:
    """With a vanishing learning rate the tokenizer and the weights of the base pass through every stage unchanged."""
    plane = new_plane()
    executor, serving = workers(plane)
    plane.client.create_model(SPEC)
    first = push_and_release(plane, 1, executor, serving)
    base = download(plane, first, plane.settings.import_roots[0] / "base")

    changes = {"name": "n", "architecture": {"base": str(base)}, "tokenizer": None}
    frozen = {"training": SPEC["training"] | {"peak_lr": 1e-12}}
    plane.client.create_model(SPEC | changes | frozen)
    same = released(plane, executor, serving, "n")
    again = download(plane, same, plane.settings.home / "again")
    assert (again / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    before, after = load_file(base / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.allclose(after[name], atol=1e-6), name
    losses = {row.slice: row.loss for row in first.evaluations}
    for row in same.evaluations:
        assert row.loss == pytest.approx(losses[row.slice], rel=1e-3)
    text = greedy(base, PROMPT, 12)
    assert text
    for model in ("m", "n"):
        assert answer(serving, model)["choices"][0]["text"] == text

    plane.client.create_model(SPEC | changes | {"name": "l"})
    learned = released(plane, executor, serving, "l")
    for row in learned.evaluations:
        base_loss = losses[row.slice]
        assert row.loss is not None
        assert base_loss is not None
        assert row.loss < base_loss - 0.01
