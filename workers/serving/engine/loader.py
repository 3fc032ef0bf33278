"""Which engine a model is served with, by what is asked for and what is there."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from service.core.serving import EngineName
from workers.serving.engine import options as defaults
from workers.serving.engine import vllm_engine, vllm_library
from workers.serving.engine.port import EngineLoader
from workers.serving.engine.transformers_engine import TransformersLoader

logger = logging.getLogger(__name__)


def engine_loader(threads: int, given: Mapping[str, Any], *, own_processes: bool = False) -> EngineLoader:
    """``given``: the ``engine``, an ``EngineName``, and what of ``EngineOptions`` is not that engine's default. ``threads``
    as ``TransformersEngine``, and whether every engine has its own process. An engine that is asked for and not installed
    fails every version, and says why.
    """
    options = dict(given)
    name = _chosen(EngineName(options.pop("engine", EngineName.AUTO)))
    logger.info("models are served by %s", name)
    if name is EngineName.VLLM:
        return vllm_engine.VllmLoader(replace(vllm_engine.DEFAULTS, **options))
    return TransformersLoader(threads, replace(defaults.DEFAULTS, **options), own_process=own_processes)


def check_installed(given: Mapping[str, Any]) -> None:
    """Raises ValueError where the engine that is asked for cannot be loaded by this process."""
    if given.get("engine") == EngineName.VLLM and not vllm_library.is_installed():
        raise ValueError(vllm_library.NOT_INSTALLED)


def _chosen(asked: EngineName) -> EngineName:
    if asked is not EngineName.AUTO:
        return asked
    there = vllm_library.is_installed() and torch.cuda.is_available()
    return EngineName.VLLM if there else EngineName.TRANSFORMERS
