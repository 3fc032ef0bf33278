"""Our calls and the stand-in agree with the interface of vLLM that ``interface.json`` records.

For each import path the record lists, in order, the parameters and fields without a default, those with a
plain default, and the names of the others.
"""

import dataclasses
import importlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.workers.serving.engine.engine_client import sequence
from tests.workers.serving.engine.vllm import stand_in
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.vllm import library as vllm_library
from workers.serving.engine.vllm.arguments import engine_arguments, sampling_arguments

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("interface.json").read_text())
PARAMETERS: dict[str, dict[str, Any]] = RECORDED["parameters"]
PLAIN = (bool, int, float, str)
STAND_INS: dict[str, Callable[..., Any]] = {
    "vllm.AsyncEngineArgs": stand_in.AsyncEngineArgs,
    "vllm.SamplingParams": stand_in.SamplingParams,
    "vllm.outputs.RequestOutput": stand_in.RequestOutput,
    "vllm.outputs.CompletionOutput": stand_in.CompletionOutput,
    "vllm.logprobs.Logprob": stand_in.Logprob,
    "vllm.inputs.TokensInput": stand_in.TokensInput,
    "vllm.inputs.tokens_input": stand_in.tokens_input,
    "vllm.AsyncLLMEngine.from_engine_args": stand_in.AsyncLLMEngine.from_engine_args,
    "vllm.AsyncLLMEngine.generate": stand_in.AsyncLLMEngine.generate,
    "vllm.AsyncLLMEngine.abort": stand_in.AsyncLLMEngine.abort,
    "vllm.AsyncLLMEngine.shutdown": stand_in.AsyncLLMEngine.shutdown,
}
# Defaults that the record cannot express, with the stand-in's value.
KINDS = {("vllm.SamplingParams", "output_kind"): stand_in.RequestOutputKind.CUMULATIVE}

REQUESTS = {
    "plain": sequence([1, 2]),
    "everything": sequence(
        [1, 2],
        temperature=1.5,
        top_p=0.5,
        seed=7,
        echo=True,
        num_logprobs=3,
        stop=("x",),
        frequency_penalty=1.0,
        presence_penalty=1.0,
        logit_bias=((1, 5.0),),
    ),
    "greedy": sequence([1, 2], top_p=0.0),
    "scores only": sequence([1, 2], max_tokens=0, echo=True, num_logprobs=1),
    "endless": dataclasses.replace(sequence([1, 2]), endless=True),
}


def names(path: str) -> set[str]:
    recorded = PARAMETERS[path]
    return {*recorded["required"], *recorded["defaults"], *recorded["others"]}


def parameters(of: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Its named parameters."""
    return {
        name: parameter
        for name, parameter in inspect.signature(of).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def described(of: Callable[..., Any]) -> dict[str, Any]:
    """Its parameters in the record's form."""
    required_keys: frozenset[str] | None = getattr(of, "__required_keys__", None)
    if required_keys is not None:  # a TypedDict: optional keys have no default
        keys = of.__annotations__
        required = [key for key in keys if key in required_keys]
        return {"required": required, "defaults": {}, "others": sorted(keys.keys() - required_keys)}
    accepted = parameters(of)
    plain = {
        name: parameter.default
        for name, parameter in accepted.items()
        if parameter.default is None or type(parameter.default) in PLAIN
    }
    required = [name for name, parameter in accepted.items() if parameter.default is parameter.empty]
    return {
        "required": required,
        "defaults": plain,
        "others": sorted(accepted.keys() - plain.keys() - set(required)),
    }


def found(path: str) -> Any:
    """The object at an import path."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(found(module), name)


def test_vllm_has_every_engine_argument() -> None:
    arguments = engine_arguments(
        Path("export"), EngineOptions(), context_length=128, cache_bytes=1 << 20, memory_share=0.1
    )
    assert arguments.keys() <= names("vllm.AsyncEngineArgs")


@pytest.mark.parametrize("name", REQUESTS)
def test_vllm_has_every_sampling_parameter(name: str) -> None:
    arguments = sampling_arguments(REQUESTS[name], frozenset({0}))
    assert arguments.keys() | {"output_kind"} <= names("vllm.SamplingParams")


@pytest.mark.parametrize("name", REQUESTS)
def test_vllm_has_every_field_of_our_prompts_and_parameters(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.install(monkeypatch)
    prompt, accepted = vllm_library.prompt_and_parameters(REQUESTS[name], frozenset({0}))
    assert set(PARAMETERS["vllm.inputs.TokensInput"]["required"]) <= prompt.keys()
    assert prompt.keys() <= names("vllm.inputs.TokensInput")
    assert vars(accepted).keys() <= names("vllm.SamplingParams")


def test_generate_requires_a_prompt_parameters_and_an_id_only() -> None:
    expected = ["prompt", "sampling_params", "request_id"]
    assert PARAMETERS["vllm.AsyncLLMEngine.generate"]["required"] == expected
    assert PARAMETERS["vllm.AsyncLLMEngine.from_engine_args"]["required"] == ["engine_args"]
    assert PARAMETERS["vllm.AsyncLLMEngine.shutdown"]["required"] == []


@pytest.mark.parametrize("path", STAND_INS)
def test_the_stand_ins_parameters_and_defaults_are_vllms(path: str) -> None:
    recorded, ours = PARAMETERS[path], described(STAND_INS[path])
    assert {*ours["required"], *ours["defaults"], *ours["others"]} <= names(path)
    assert set(ours["required"]) <= set(recorded["required"])
    assert ours["defaults"].items() <= recorded["defaults"].items()
    for name in ours["others"]:
        assert name in recorded["others"]
        assert parameters(STAND_INS[path])[name].default == KINDS[path, name]


@pytest.mark.parametrize("path", [path for path, of in STAND_INS.items() if inspect.isroutine(of)])
def test_the_stand_in_requires_the_same_parameters(path: str) -> None:
    assert described(STAND_INS[path])["required"] == PARAMETERS[path]["required"]


def test_the_stand_in_has_the_same_output_kinds() -> None:
    kinds = {kind.name: kind.value for kind in stand_in.RequestOutputKind}
    assert kinds == RECORDED["members"]["vllm.sampling_params.RequestOutputKind"]


def test_everything_in_the_record_has_a_stand_in_at_the_same_import_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert STAND_INS.keys() == PARAMETERS.keys()
    stand_in.install(monkeypatch)
    for path in ("vllm.AsyncEngineArgs", "vllm.SamplingParams", "vllm.inputs.tokens_input"):
        assert found(path) is STAND_INS[path]
    for path in RECORDED["members"]:
        assert found(path) is stand_in.RequestOutputKind


def test_vllms_engine_has_the_stand_ins_attributes() -> None:
    attributes = RECORDED["attributes"]
    assert isinstance(vars(stand_in.AsyncLLMEngine)["errored"], property)
    assert "errored" in attributes["vllm.AsyncLLMEngine"]
    assert "cache_config" in attributes["vllm.config.VllmConfig"]
    assert "kv_cache_size_tokens" in attributes["vllm.config.CacheConfig"]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.filterwarnings("default")
def test_the_record_is_the_installed_vllms_interface() -> None:
    installed = importlib.metadata.version("vllm").partition("+")[0]
    if installed != RECORDED["version"]:
        pytest.skip(f"{RECORDED['version']} is recorded, {installed} installed")
    for path, recorded in PARAMETERS.items():
        real = described(found(path))
        assert real["required"] == recorded["required"], path
        assert {*real["required"], *real["defaults"], *real["others"]} == names(path), path
        assert recorded["defaults"].items() <= real["defaults"].items(), path
    for path, members in RECORDED["members"].items():
        kinds: type[Enum] = found(path)
        assert {kind.name: kind.value for kind in kinds} == members
    for path, attributes in RECORDED["attributes"].items():
        owner = found(path)
        known = {*dir(owner), *getattr(owner, "__dataclass_fields__", ())}
        assert set(attributes) <= known, path
