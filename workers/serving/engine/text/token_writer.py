"""Turns the tokens of one sequence into events with text, offsets and scores."""

from typing import NamedTuple

from workers.serving.engine.port import SequenceRequest
from workers.serving.engine.text.detokenizer import Vocabulary
from workers.serving.engine.text.stop_strings import StopStrings
from workers.serving.generation import Alternative, Finished, FinishReason, Token

LEAST_LOGPROB = -9999.0  # OpenAI's value for an impossible token: JSON has no -inf


class TokenScore(NamedTuple):
    """A token's log-probability in nats, and the most likely tokens with theirs, best first.

    No log-probability is below ``LEAST_LOGPROB``.
    """

    logprob: float
    top: list[tuple[int, float]]


class TokenWriter:
    """Takes the tokens of one sequence in order and tracks how much of the text has been shown."""

    def __init__(self, vocabulary: Vocabulary, request: SequenceRequest) -> None:
        self._vocabulary = vocabulary
        self._index = request.index
        self._text = vocabulary.detokenizer(() if request.sampling.echo else request.prompt)
        self._stop = StopStrings(request.sampling.stop)
        self._offset = 0

    @property
    def stopped(self) -> bool:
        """Whether the text has reached a stop string."""
        return self._stop.hit

    def prompt_token(self, token: int, score: TokenScore | None) -> Token:
        text = self._text.push(token)
        return self._event(token, score, text, len(text))

    def sampled_token(self, token: int, score: TokenScore | None, *, silent: bool) -> Token:
        """``silent``: the token ends the text and is not part of it, whether or not it is special."""
        text = "" if silent else self._text.push(token)
        return self._event(token, score, self._stop.push(text), len(text))

    def finish(self, reason: FinishReason, num_tokens: int) -> Finished:
        rest = "" if self._stop.hit else self._stop.push(self._text.flush())
        if not self._stop.hit:
            rest += self._stop.flush()
        return Finished(self._index, reason, rest, num_tokens)

    def _event(self, token: int, score: TokenScore | None, shown: str, num_characters: int) -> Token:
        top = None
        if score is not None:
            top = tuple(
                Alternative(self._vocabulary.piece(id), self._vocabulary.raw(id), logprob)
                for id, logprob in score.top
            )
        event = Token(
            index=self._index,
            text=shown,
            piece=self._vocabulary.piece(token),
            raw=self._vocabulary.raw(token),
            offset=self._offset,
            logprob=None if score is None else score.logprob,
            top=top,
        )
        self._offset += num_characters
        return event
