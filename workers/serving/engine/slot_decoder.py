"""Continuous batching: all sequences in flight are fed to the model together, turn after turn, by one thread.

Every turn is one forward pass, over a token of each sequence that is being continued or a piece of the prompts of those that
have just come, or both: between two turns sequences end, are cancelled, and others take their slots.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.serving.engine.decoding import DecodingSize
from workers.serving.engine.detokenizer import Vocabulary
from workers.serving.engine.forward import Forward, Piece
from workers.serving.engine.port import (
    CLOSED,
    NOT_FINITE,
    EngineError,
    EngineEvent,
    SequenceFailed,
    SequenceRequest,
    Sink,
)
from workers.serving.engine.sampling import Chooser, Score, all_finite, choose, score
from workers.serving.engine.slots import Slots
from workers.serving.engine.token_writer import TokenWriter
from workers.serving.engine.turns import Turns
from workers.serving.generation import FinishReason

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 496  # of prompts a turn: beside the tokens of 16 that are being continued, 512 rows
MIN_PREFILL_TOKENS = 16
MOST_PROMPT_TURNS = 2  # in a row, while others are being continued
# Of a turn. Whoever is being continued waits for up to three of them, the third of which is its own too; and a turn that takes
# long is taken for a hang.
PREFILL_SECONDS = 2.0
SCORED_LOGITS = 1 << 24  # rows while scoring prompts, times vocabulary: 64 MiB, twice while they are made


@dataclass(eq=False)
class _Sequence:
    request: SequenceRequest
    sink: Sink
    cancelled: threading.Event
    writer: TokenWriter
    chooser: Chooser
    slot: int = -1
    num_fed: int = 0
    unfed: list[int] = field(default_factory=list)  # the rest of the prompt, then the token chosen last
    num_sampled: int = 0

    @property
    def scores_prompt(self) -> bool:
        return self.request.sampling.echo and self.request.sampling.num_logprobs is not None

    @property
    def in_prompt(self) -> bool:
        return self.num_fed < len(self.request.prompt)


class SlotDecoder:
    """Decodes over one forward, which is its own from now on. Sequences come from any thread."""

    def __init__(
        self,
        forward: Forward,
        vocabulary: Vocabulary,
        end_tokens: frozenset[int],
        vocab_size: int,
    ) -> None:
        self._forward = forward
        self._vocabulary = vocabulary
        self._end_tokens = end_tokens
        self.size = DecodingSize(forward.num_slots, forward.slot_tokens, vocab_size)
        self.turns = Turns()
        self._max_scored = max(16, SCORED_LOGITS // vocab_size)
        self._slots = Slots(forward.num_slots, reuses=forward.reuses)
        self._active: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._prompt_turns = 0  # just now, one after another
        self._read_rate = math.inf  # tokens per second, in the last turn of many
        self._closing = False
        self._changed = threading.Condition()

    @property
    def cached_tokens(self) -> int:
        """How many tokens have their keys and values kept."""
        return self._slots.num_held

    @property
    def is_idle(self) -> bool:
        return not (self._active or self._waiting)

    def submit(self, requests: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        """See ``Decoding.submit``."""
        cancelled = threading.Event()
        sequences = [
            _Sequence(
                request,
                sink,
                cancelled,
                TokenWriter(self._vocabulary, request),
                Chooser(request.sampling, request.seed),
            )
            for request in requests
        ]
        with self._changed:
            if self._closing:
                raise EngineError(CLOSED)
            self._waiting.extend(sequences)
            self._changed.notify()
        return cancelled.set

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()

    @torch.inference_mode()
    def decode_until_closed(self, report: Callable[[], None] = lambda: None) -> None:
        """``report`` is called after every turn, and whenever there is nothing to do. Never raises: what fails, fails
        sequences.
        """
        while self._admit(report):
            self.turns.begin()
            self._take_turn()
            self.turns.end()
            report()
        for sequence in [*self._active, *self._waiting]:
            sequence.sink([SequenceFailed(sequence.request.index, CLOSED)])

    def _admit(self, report: Callable[[], None]) -> bool:
        """Let go of what was cancelled, and give free slots away, waiting until there is something to do. False once
        closed.
        """
        for sequence in [sequence for sequence in self._active if sequence.cancelled.is_set()]:
            self._let_go(sequence)
        with self._changed:
            self._fill_slots()
            while not (self._closing or self._active):
                report()
                self._changed.wait()
                self._fill_slots()
            return not self._closing

    def _fill_slots(self) -> None:
        passed: list[_Sequence] = []
        # Few are passed over: each look compares a prompt with all slots.
        while self._waiting and self._slots.any_free() and len(passed) < self._forward.num_slots:
            sequence = self._waiting.popleft()
            if not sequence.cancelled.is_set() and not self._begin(sequence):
                passed.append(sequence)
        self._waiting.extendleft(reversed(passed))

    def _begin(self, sequence: _Sequence) -> bool:
        prompt = sequence.request.prompt
        place = self._slots.take(prompt, whole=sequence.scores_prompt)
        if place is None:
            return False
        if place.source != place.slot:
            self._forward.copy(place.source, place.slot, place.num_held)
        sequence.slot, sequence.num_fed = place.slot, place.num_held
        sequence.unfed = list(prompt[place.num_held :])
        self._active.append(sequence)
        return True

    def _let_go(self, sequence: _Sequence, *, spoilt: bool = False) -> None:
        self._active.remove(sequence)
        self._slots.give_back(sequence.slot, spoilt=spoilt)
        if spoilt:
            self._forward.clear(sequence.slot)

    def _take_turn(self) -> None:
        turn = self._plan()
        emitted: dict[Sink, list[EngineEvent]] = {}
        try:
            began = time.monotonic()
            logits_RV = self._forward([piece for _, piece in turn])
            num_tokens = sum(len(piece.tokens) for _, piece in turn)
            if num_tokens >= MIN_PREFILL_TOKENS:
                self._read_rate = num_tokens / max(time.monotonic() - began, 1e-9)
            for sequence, events in self._advance(turn, logits_RV):
                if events:
                    emitted.setdefault(sequence.sink, []).extend(events)
        except (
            Exception
        ) as error:  # a pass is for all of them: none can be spared, and others may still be answered
            logger.exception("a turn failed")
            for sequence, _ in turn:
                if sequence in self._active:
                    self._let_go(sequence, spoilt=True)
                failed = SequenceFailed(sequence.request.index, f"{type(error).__name__}: {error}")
                emitted.setdefault(sequence.sink, []).append(failed)
        for sink, events in emitted.items():
            sink(events)

    def _plan(self) -> list[tuple[_Sequence, Piece]]:
        """What is fed in the next turn: those that are being continued by slot, then prompts as they came.

        Prompts that have their first token after one turn are given one of their own: in a turn with all others it would
        come half as late again. At most two in a row, the second for those that came in the first: who is being continued waits for
        no more.
        """
        continued = sorted((s for s in self._active if not s.in_prompt), key=lambda sequence: sequence.slot)
        prompts = self._prompt_pieces()
        whole = all(len(piece.tokens) == len(sequence.unfed) for sequence, piece in prompts)
        num_in_prompt = len(self._active) - len(continued)
        may_go_first = bool(continued) and self._prompt_turns < MOST_PROMPT_TURNS
        if may_go_first and 0 < num_in_prompt == len(prompts) and whole:
            self._prompt_turns += 1
            return prompts
        self._prompt_turns = 0
        return [(s, Piece(s.slot, s.num_fed, s.unfed, 1)) for s in continued] + prompts

    def _prompt_pieces(self) -> list[tuple[_Sequence, Piece]]:
        pieces: list[tuple[_Sequence, Piece]] = []
        readable = max(self._read_rate * PREFILL_SECONDS, MIN_PREFILL_TOKENS)
        room, scored_room = int(min(readable, PREFILL_TOKENS)), self._max_scored
        for sequence in self._active:
            if not sequence.in_prompt:
                continue
            num_tokens = min(len(sequence.unfed), room, scored_room if sequence.scores_prompt else room)
            if num_tokens == 0:
                continue
            tokens = sequence.unfed[:num_tokens]
            if sequence.scores_prompt:
                num_logits = num_tokens
                scored_room -= num_tokens
            else:
                num_logits = int(num_tokens == len(sequence.unfed))
            room -= num_tokens
            pieces.append((sequence, Piece(sequence.slot, sequence.num_fed, tokens, num_logits)))
        return pieces

    def _advance(
        self, turn: Sequence[tuple[_Sequence, Piece]], logits_RV: Tensor
    ) -> list[tuple[_Sequence, list[EngineEvent]]]:
        """What a turn's logits mean for its sequences: their events, their next tokens, the end of some."""
        events: dict[_Sequence, list[EngineEvent]] = {}
        to_choose: list[tuple[_Sequence, int]] = []  # with the row to choose from
        row = 0
        for sequence, piece in turn:
            self._slots.feed(sequence.slot, piece.tokens)
            events[sequence] = []
            logits_TV = logits_RV[row : row + piece.num_logits]
            row += piece.num_logits
            if sequence.in_prompt and sequence.request.sampling.echo:
                if sequence.scores_prompt and not all_finite(logits_TV):
                    events[sequence].append(self._spoilt(sequence))
                    continue
                events[sequence] += self._echo(sequence, piece, logits_TV)
            sequence.num_fed += len(piece.tokens)
            sequence.unfed = sequence.unfed[len(piece.tokens) :]
            if not sequence.in_prompt:
                to_choose.append((sequence, row - 1))
        ended = [sequence for sequence, _ in to_choose if sequence.request.max_tokens == 0]
        for sequence in ended:
            events[sequence].append(sequence.writer.finish(FinishReason.LENGTH, 0))
            self._let_go(sequence)
        to_choose = [pair for pair in to_choose if pair[0] not in ended]
        if to_choose:
            # Nearly always every row there is: then it is not copied.
            rows = [row for _, row in to_choose]
            chosen_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
            tokens = choose(chosen_RV, [sequence.chooser for sequence, _ in to_choose])
            scores = _scores(chosen_RV, tokens, [sequence for sequence, _ in to_choose])
            for (sequence, _), token, token_score in zip(to_choose, tokens, scores, strict=True):
                events[sequence] += self._take(sequence, token, token_score)
        return list(events.items())

    def _take(self, sequence: _Sequence, token: int | None, token_score: Score | None) -> list[EngineEvent]:
        """A sequence goes on with the token that was chosen for it, or is over."""
        if token is None:
            return [self._spoilt(sequence)]
        sequence.num_sampled += 1
        sequence.unfed = [token]
        ends = token in self._end_tokens and not sequence.request.endless
        event = sequence.writer.sampled_token(token, token_score, silent=ends)
        reason = None
        if ends or sequence.writer.stopped:
            reason = FinishReason.STOP
        elif sequence.num_sampled == sequence.request.max_tokens:
            reason = FinishReason.LENGTH
        if reason is None:
            return [event]
        self._let_go(sequence)
        return [event, sequence.writer.finish(reason, sequence.num_sampled)]

    def _spoilt(self, sequence: _Sequence) -> SequenceFailed:
        self._let_go(sequence, spoilt=True)
        return SequenceFailed(sequence.request.index, f"EngineError: {NOT_FINITE}")

    def _echo(self, sequence: _Sequence, piece: Piece, logits_TV: Tensor) -> list[EngineEvent]:
        """The prompt's tokens, scored where that was asked for: all of them at once where it was not."""
        prompt, writer = sequence.request.prompt, sequence.writer
        num_logprobs = sequence.request.sampling.num_logprobs
        if num_logprobs is None:
            return (
                [] if sequence.unfed[len(piece.tokens) :] else [writer.prompt_token(t, None) for t in prompt]
            )
        first: list[EngineEvent] = [writer.prompt_token(prompt[0], None)] if piece.begin == 0 else []
        # A row predicts the next token: the prompt's first has no score, and the last row none to score.
        predicted = prompt[piece.begin + 1 : piece.begin + 1 + len(piece.tokens)]
        if not predicted:
            return first
        scores = score(logits_TV[: len(predicted)], predicted, num_logprobs)
        return first + [writer.prompt_token(*pair) for pair in zip(predicted, scores, strict=True)]


def _scores(
    logits_RV: Tensor, tokens: Sequence[int | None], sequences: Sequence[_Sequence]
) -> list[Score | None]:
    """The scores of the tokens whose sequences ask for them."""
    scores: list[Score | None] = [None] * len(tokens)
    wanted: dict[int, list[int]] = {}
    for row, (token, sequence) in enumerate(zip(tokens, sequences, strict=True)):
        num_logprobs = sequence.request.sampling.num_logprobs
        if num_logprobs is not None and token is not None:
            wanted.setdefault(num_logprobs, []).append(row)
    for num_logprobs, rows in wanted.items():
        chosen = [token for row in rows if (token := tokens[row]) is not None]
        for row, row_score in zip(rows, score(logits_RV[rows], chosen, num_logprobs), strict=True):
            scores[row] = row_score
    return scores
