"""Measured hardware capabilities are stable, and bf16 needs both instructions and speed."""

import subprocess
import sys

import pytest
import torch

from workers.executors import capabilities as module
from workers.executors.capabilities import measure_capabilities


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(6)))
    assert [measure_capabilities(workers).threads for workers in (1, 2, 4, 6, 9)] == [6, 3, 1, 1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a CPU")
def test_bf16_on_a_cpu_needs_instructions_and_must_be_faster_than_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "bf16_is_faster", lambda: True)
    for flags, bf16 in (({"avx2", "avx512f"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True)):
        monkeypatch.setattr(module, "cpu_flags", lambda flags=flags: flags)
        assert measure_capabilities(1).bf16 is bf16
    monkeypatch.setattr(module, "bf16_is_faster", lambda: False)
    assert measure_capabilities(1).bf16 is False
    assert measure_capabilities(1).device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a CPU")
def test_load_on_the_machine_does_not_change_the_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_flags", lambda: {"avx512_bf16"})  # measure bf16 on any CPU
    idle = measure_capabilities(1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        assert {measure_capabilities(1) for _ in range(10)} == {idle}
    finally:
        for process in busy:
            process.kill()
            process.wait()
