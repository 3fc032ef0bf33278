"""Chooses the engine that serves a model."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from service.core.serving import EngineName
from workers.serving.engine import options as defaults
from workers.serving.engine.batching.transformers_engine import TransformersLoader
from workers.serving.engine.port import EngineLoader
from workers.serving.engine.vllm import library
from workers.serving.engine.vllm.loader import VllmLoader
from workers.serving.engine.vllm.sizing import DEFAULTS as VLLM_DEFAULTS

logger = logging.getLogger(__name__)


def engine_loader(threads: int, config: Mapping[str, Any], *, own_processes: bool = False) -> EngineLoader:
    """The loader that ``config`` selects: ``engine`` (an ``EngineName``) and fields of ``EngineOptions``.

    Fields that are missing keep the engine's defaults. ``threads`` is passed to ``TransformersEngine``; with
    ``own_processes`` every engine decodes in a process of its own. If the engine is not installed, every load
    fails and reports it.
    """
    options = dict(config)
    name = _resolve(EngineName(options.pop("engine", EngineName.AUTO)))
    logger.info("models are served by %s", name)
    if name is EngineName.VLLM:
        return VllmLoader(replace(VLLM_DEFAULTS, **options))
    return TransformersLoader(threads, replace(defaults.DEFAULTS, **options), own_process=own_processes)


def check_installed(config: Mapping[str, Any]) -> None:
    """Raise ValueError if ``config`` names an engine that is not installed."""
    if config.get("engine") == EngineName.VLLM and not library.is_installed():
        raise ValueError(library.NOT_INSTALLED)


def _resolve(name: EngineName) -> EngineName:
    if name is not EngineName.AUTO:
        return name
    vllm_runs = library.is_installed() and torch.cuda.is_available()
    return EngineName.VLLM if vllm_runs else EngineName.TRANSFORMERS
