"""Loads vLLM engines."""

from pathlib import Path

from workers.serving.engine.memory import free_bytes, this_device
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.vllm.engine import VllmEngine
from workers.serving.engine.vllm.sizing import DEFAULTS, needed_bytes


class VllmLoader:
    """Loads engines, each with a process of its own.

    A load fails with the reason if vLLM is not installed.
    """

    def __init__(self, options: EngineOptions = DEFAULTS) -> None:
        self.options = options

    def needed_bytes(self, folder: Path) -> int:
        return needed_bytes(folder, self.options)

    def free_bytes(self) -> int:
        return free_bytes(this_device())

    def load(self, folder: Path, seconds: float) -> VllmEngine:
        return VllmEngine(folder, self.options, seconds)
