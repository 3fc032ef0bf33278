"""Renders a replica's answer items as OpenAI's JSON, whole or as stream chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from workers.serving.generation import (
    Alternative,
    AnswerItem,
    Discarded,
    Finished,
    FinishReason,
    Started,
    Token,
    versioned_name,
)

JSON = dict[str, Any]


class Choice:
    """One choice's share of a batch of items, or of the whole answer."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.text = ""
        self.reason: FinishReason | None = None

    def add(self, item: Token | Finished) -> None:
        self.text += item.text
        if isinstance(item, Token):
            self.tokens.append(item)
        else:
            self.reason = item.reason


class Rendering(ABC):
    """Renders one answer. ``num_logprobs`` (None: none) and ``include_usage`` come from the request."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self, model: str, started: Started, *, num_logprobs: int | None, include_usage: bool
    ) -> None:
        self.number = started.number
        self._head: JSON = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": versioned_name(model, started.number),
        }
        self._num_prompt_tokens = started.num_prompt_tokens
        self._num_completion_tokens = 0
        self._num_logprobs = num_logprobs
        self._include_usage = include_usage

    def whole(self, items: list[AnswerItem]) -> JSON:
        """Return the whole answer."""
        choices = [
            {"index": index, **self._content(choice), "finish_reason": choice.reason}
            for index, choice in sorted(self._by_choice(items).items())
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage()}

    def chunks(self, items: list[AnswerItem]) -> Iterator[JSON]:
        """Yield one chunk for every choice that the batch extends."""
        for index, choice in self._by_choice(items).items():
            if choice.tokens or choice.text or choice.reason is not None:
                yield self._chunk({"index": index, **self._delta(choice), "finish_reason": choice.reason})

    def opening(self, num_choices: int) -> Iterator[JSON]:
        """Yield the chunks that precede the first token."""
        yield from ()

    def closing(self) -> Iterator[JSON]:
        """Yield the chunks that follow the last token: the usage, if requested."""
        if self._include_usage:
            yield {**self._head, "object": self.chunk_object, "choices": [], "usage": self._usage()}

    @abstractmethod
    def _content(self, choice: Choice) -> JSON:
        """Return the fields of a choice in a whole answer."""

    @abstractmethod
    def _delta(self, choice: Choice) -> JSON:
        """Return the fields of a choice in a chunk."""

    def _chunk(self, choice: JSON) -> JSON:
        usage: JSON = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": [choice], **usage}

    def _by_choice(self, items: list[AnswerItem]) -> dict[int, Choice]:
        choices: dict[int, Choice] = {}
        for item in items:
            if isinstance(item, Token | Finished):
                choices.setdefault(item.index, Choice()).add(item)
            if isinstance(item, Finished | Discarded):
                self._num_completion_tokens += item.num_tokens
        return choices

    def _usage(self) -> JSON:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
        }


class CompletionRendering(Rendering):
    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _content(self, choice: Choice) -> JSON:
        return {"text": choice.text, "logprobs": self._token_logprobs(choice.tokens)}

    _delta = _content

    def _token_logprobs(self, tokens: list[Token]) -> JSON | None:
        if self._num_logprobs is None:
            return None
        return {
            "tokens": [token.piece for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_best_by_text(token.top) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class ChatRendering(Rendering):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, num_choices: int) -> Iterator[JSON]:
        for index in range(num_choices):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _content(self, choice: Choice) -> JSON:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._token_logprobs(choice.tokens)}

    def _delta(self, choice: Choice) -> JSON:
        delta = {"content": choice.text} if choice.text else {}
        return {"delta": delta, "logprobs": self._token_logprobs(choice.tokens)}

    def _token_logprobs(self, tokens: list[Token]) -> JSON | None:
        if self._num_logprobs is None:
            return None
        content = [
            {
                "token": token.piece,
                "logprob": token.logprob,
                "bytes": list(token.raw),
                "top_logprobs": [
                    {"token": other.text, "logprob": other.logprob, "bytes": list(other.raw)}
                    # Completions append the chosen token; chat returns exactly the requested number.
                    for other in (token.top or ())[: self._num_logprobs]
                ],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _best_by_text(top: tuple[Alternative, ...] | None) -> dict[str, float] | None:
    """Map each alternative's text to its log-probability, the higher one where two tokens share a text."""
    if top is None:
        return None
    best: dict[str, float] = {}
    for alternative in top:
        best[alternative.text] = max(alternative.logprob, best.get(alternative.text, alternative.logprob))
    return best
