"""What only a GPU can show. On a machine with one, the other tests of engines run on it too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.waiting import until
from tests.workers.serving.engine.engine_client import finish, run, sequence
from workers.serving.engine.batching.transformers_engine import TransformersLoader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ROOT = Path(__file__).parents[4]
CONTEXT_BYTES = 700 << 20  # at most: of a process that uses the GPU
SLACK_BYTES = 64 << 20


ASKING = """
import torch
from workers.serving.engine import memory

if __name__ == "__main__":
    device = torch.device("cuda")
    print(memory.free_bytes(device), memory.total_bytes(device), torch.cuda.is_initialized())
"""


def test_asking_for_free_memory_takes_none() -> None:
    process = subprocess.run(
        [sys.executable, "-c", ASKING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    free, total, initialized = process.stdout.split()
    assert 0 < int(free) < int(total)
    assert initialized == "False"


def test_an_engine_takes_at_most_its_estimate_and_returns_all_of_it(export: Path) -> None:
    loader = TransformersLoader(own_process=True)
    before = loader.free_bytes()
    engine = loader.load(export, 120.0)
    assert finish(run(engine, sequence(engine.encode("The cat"), max_tokens=3))[0]).num_tokens == 3
    taken = before - loader.free_bytes()
    assert CONTEXT_BYTES / 4 < taken < loader.needed_bytes(export) + CONTEXT_BYTES
    engine.close()
    until(lambda: before - loader.free_bytes() < SLACK_BYTES)
