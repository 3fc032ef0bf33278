"""Request bodies of OpenAI's completions and chat completions.

Parameters that do not change the answer are accepted and ignored. Parameters that would change it and are not
implemented are declared with their neutral values; any other value is rejected, as are unknown parameters.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from workers.serving.generation import Chat, ChatMessage, Generation, Prompt, Sampling, parse_model_name

DEFAULT_COMPLETION_TOKENS = 16
MAX_LOGPROBS = 20

TokenId = Annotated[int, Field(strict=True, ge=0)]
BiasedToken = Annotated[int, Field(ge=0)]  # not strict: the keys of a JSON object are strings
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class _Object(BaseModel):
    """An object of a request. Nulls count as absent, unknown fields included, because clients send unset
    parameters as null.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(_Object):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: not part of the answer


class _Request(_Object):
    """Parameters shared by both kinds of request."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[BiasedToken, Bias] | None = Field(default=None, max_length=1024)

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 16:
            raise ValueError("at most 16 stop strings are allowed")
        if stop is not None and (stop == "" or "" in list(stop)):
            raise ValueError("a stop string must not be empty")
        return stop

    @model_validator(mode="after")
    def _reject_unsupported(self, info: ValidationInfo) -> "_Request":
        for name, neutral in self.NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise rejection(name, f"`{name}` is not supported by this server")
        if self.stream_options is not None and not self.stream:
            raise rejection("stream_options", "`stream_options` is only allowed when `stream` is true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, *, max_tokens: int | None, num_logprobs: int | None, echo: bool = False) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(stop),
            seed=self.seed,
            num_logprobs=num_logprobs,
            echo=echo,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
        )


class CompletionRequest(_Request):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    best_of: int | None = Field(default=None, ge=1)
    suffix: str | None = None

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"suffix": ("",)}

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise rejection("best_of", "`best_of` must be at least `n`")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise rejection("best_of", "`best_of` greater than `n` cannot be streamed")
        return self

    def generation(self) -> Generation:
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        model, version = parse_model_name(self.model)
        return Generation(
            model=model,
            version=version,
            prompts=self._prompts(),
            sampling=self._sampling(max_tokens=max_tokens, num_logprobs=self.logprobs, echo=bool(self.echo)),
            n=self.n or 1,
            stream=bool(self.stream),
            best_of=None if self.best_of == (self.n or 1) else self.best_of,
        )

    def _prompts(self) -> tuple[Prompt, ...]:
        """Return one prompt or several. A flat list of numbers is one prompt; None is the empty prompt."""
        if self.prompt is None or isinstance(self.prompt, str):
            return (self.prompt or "",)
        prompts: list[Prompt] = []
        ids: list[int] = []
        for item in self.prompt:
            if isinstance(item, int):
                ids.append(item)
            else:
                prompts.append(item if isinstance(item, str) else tuple(item))
        return (tuple(ids),) if ids else tuple(prompts)

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        if prompt == []:
            raise ValueError("at least one prompt is required")
        return prompt


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class Message(_Object):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    # Present when a client sends one of our answers back.
    annotations: list[Any] = Field(default=[], max_length=0)

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None

    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "store": (False,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
    }

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise rejection("top_logprobs", "`top_logprobs` requires `logprobs` to be true")
        return self

    def generation(self) -> Generation:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        messages = tuple(ChatMessage(message.role, message.text()) for message in self.messages)
        model, version = parse_model_name(self.model)
        return Generation(
            model=model,
            version=version,
            prompts=(Chat(messages),),
            sampling=self._sampling(max_tokens=max_tokens, num_logprobs=num_logprobs),
            n=self.n or 1,
            stream=bool(self.stream),
        )


def rejection(param: str, message: str) -> PydanticCustomError:
    """Return a validation error about ``param``, independent of which validator raises it."""
    return PydanticCustomError("rejected", "{message}", {"message": message, "param": param})
