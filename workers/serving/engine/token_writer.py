"""The tokens of one sequence as events: text to show, offsets, scores."""

from workers.serving.engine.detokenizer import StopStrings, Vocabulary
from workers.serving.engine.port import SequenceRequest
from workers.serving.engine.sampling import Score
from workers.serving.generation import Alternative, Finished, FinishReason, Token


class TokenWriter:
    """Knows what of a sequence has been shown; pushed token by token, in order."""

    def __init__(self, vocabulary: Vocabulary, request: SequenceRequest) -> None:
        self._vocabulary = vocabulary
        self._index = request.index
        self._text = vocabulary.detokenizer(() if request.sampling.echo else request.prompt)
        self._stop = StopStrings(request.sampling.stop)
        self._offset = 0

    @property
    def stopped(self) -> bool:
        return self._stop.hit

    def prompt_token(self, token: int, token_score: Score | None) -> Token:
        text = self._text.push(token)
        return self._event(token, token_score, text, len(text))

    def sampled_token(self, token: int, token_score: Score | None, *, silent: bool) -> Token:
        """``silent`` for a token that ends the text, whether or not the tokenizer calls it special."""
        text = "" if silent else self._text.push(token)
        return self._event(token, token_score, self._stop.push(text), len(text))

    def finish(self, reason: FinishReason, num_tokens: int) -> Finished:
        rest = "" if self._stop.hit else self._stop.push(self._text.flush())
        if not self._stop.hit:
            rest += self._stop.flush()
        return Finished(self._index, reason, rest, num_tokens)

    def _event(self, token: int, token_score: Score | None, shown: str, num_characters: int) -> Token:
        top = None
        if token_score is not None:
            top = tuple(
                Alternative(self._vocabulary.piece(id), self._vocabulary.raw(id), logprob)
                for id, logprob in token_score.top
            )
        event = Token(
            index=self._index,
            text=shown,
            piece=self._vocabulary.piece(token),
            raw=self._vocabulary.raw(token),
            offset=self._offset,
            logprob=None if token_score is None else token_score.logprob,
            top=top,
        )
        self._offset += num_characters
        return event
