"""A whole update in one process, with real stages and a real server: data in, the new model version answers."""

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
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.slow_on_postgres
def test_two_data_versions_become_served_model_versions_and_equal_runs_are_equal_to_the_bit(
    new_plane: NewPlane, workers: Workers
) -> None:
    made = []
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
        made.append(versions)
    assert made[0] == made[1]
    assert made[0][0] != made[0][1]


def test_a_line_goes_on_from_a_base_checkpoint(new_plane: NewPlane, workers: Workers) -> None:
    """A rate too small to move anything shows that base, tokenizer and weights go through every stage as they are."""
    plane = new_plane()
    executor, serving = workers(plane)
    plane.client.create_model(SPEC)
    first = push_and_release(plane, 1, executor, serving)
    base = download(plane, first, plane.settings.import_roots[0] / "base")

    changes = {"name": "n", "architecture": {"base": str(base)}, "tokenizer": None}
    still = {"training": SPEC["training"] | {"peak_lr": 1e-12}}
    plane.client.create_model(SPEC | changes | still)
    same = released(plane, executor, serving, "n")
    again = download(plane, same, plane.settings.home / "again")
    assert (again / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    given, kept = load_file(base / "model.safetensors"), load_file(again / "model.safetensors")
    assert given.keys() == kept.keys()
    for name, tensor in given.items():
        assert tensor.allclose(kept[name], atol=1e-6), name
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
        before = losses[row.slice]
        assert row.loss is not None
        assert before is not None
        assert row.loss < before - 0.01
