"""Continuous batching: one thread feeds all sequences in flight to the model together, step after step.

Each engine step is one forward pass over a token of every decoding sequence, or over chunks of new prompts,
or both. Between steps, sequences end or are cancelled, and others take their slots.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.serving.engine.batching.decoder import DecoderLimits
from workers.serving.engine.batching.decoding_sequence import DecodingSequence
from workers.serving.engine.batching.model_runner import ModelRunner
from workers.serving.engine.batching.sampler import Sampler, sample, score_sampled
from workers.serving.engine.batching.slots import SlotTable
from workers.serving.engine.batching.step_planner import Step, StepPlanner
from workers.serving.engine.port import (
    CLOSED,
    EngineError,
    EngineEvent,
    SequenceFailed,
    SequenceRequest,
    Sink,
    num_ended,
)
from workers.serving.engine.step_clock import StepClock
from workers.serving.engine.text.detokenizer import Vocabulary
from workers.serving.engine.text.token_writer import TokenWriter

logger = logging.getLogger(__name__)


class SlotDecoder:
    """Decodes with one model runner, which it owns. Any thread may submit sequences."""

    def __init__(
        self,
        runner: ModelRunner,
        vocabulary: Vocabulary,
        end_tokens: frozenset[int],
        vocab_size: int,
    ) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._end_tokens = end_tokens
        self.limits = DecoderLimits(runner.num_slots, runner.slot_tokens, vocab_size)
        self.clock = StepClock()
        self._planner = StepPlanner(vocab_size)
        self._slots = SlotTable(runner.num_slots, reuses=runner.reuses)
        self._active: list[DecodingSequence] = []
        self._waiting: deque[DecodingSequence] = deque()
        self._closing = False
        self._changed = threading.Condition()

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the KV cache."""
        return self._slots.num_held

    @property
    def is_idle(self) -> bool:
        return not (self._active or self._waiting)

    def submit(self, requests: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        """See ``Decoder.submit``."""
        cancelled = threading.Event()
        sequences = [
            DecodingSequence(
                request,
                sink,
                cancelled,
                TokenWriter(self._vocabulary, request),
                Sampler(request.sampling, request.seed),
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
        """Run steps until closed, and call ``report`` after every step and when idle.

        An error fails the sequences of its step and is not raised.
        """
        while self._fill_slots(report):
            self.clock.start()
            self._run_step()
            self.clock.stop()
            report()
        for sequence in [*self._active, *self._waiting]:
            sequence.sink([SequenceFailed(sequence.request.index, CLOSED)])

    def _fill_slots(self, report: Callable[[], None]) -> bool:
        """Release cancelled sequences and fill free slots, blocking until there is work.

        False once closed.
        """
        for sequence in [sequence for sequence in self._active if sequence.cancelled.is_set()]:
            self._release(sequence)
        with self._changed:
            self._start_waiting()
            while not (self._closing or self._active):
                report()
                self._changed.wait()
                self._start_waiting()
            return not self._closing

    def _start_waiting(self) -> None:
        skipped: list[DecodingSequence] = []
        # Skip only so many, because each attempt compares a prompt with all slots.
        while self._waiting and self._slots.any_free() and len(skipped) < self._runner.num_slots:
            sequence = self._waiting.popleft()
            if not sequence.cancelled.is_set() and not self._start(sequence):
                skipped.append(sequence)
        self._waiting.extendleft(reversed(skipped))

    def _start(self, sequence: DecodingSequence) -> bool:
        """Move a sequence into a slot. False if it should wait for a prefix that is being computed."""
        prompt = sequence.request.prompt
        assignment = self._slots.assign(prompt, whole=sequence.scores_prompt)
        if assignment is None:
            return False
        slot, source, num_held = assignment
        if source != slot:
            self._runner.copy(source, slot, num_held)
        sequence.slot, sequence.num_fed = slot, num_held
        sequence.unfed = list(prompt[num_held:])
        self._active.append(sequence)
        return True

    def _release(self, sequence: DecodingSequence, *, discard: bool = False) -> None:
        """Free a sequence's slot.

        ``discard``: do not reuse its contents, which may be non-finite or differ from the record.
        """
        self._active.remove(sequence)
        self._slots.release(sequence.slot, discard=discard)
        if discard:
            self._runner.clear(sequence.slot)

    def _run_step(self) -> None:
        step = self._planner.plan(self._active)
        try:
            started = time.monotonic()
            logits_RV = self._runner([chunk for _, chunk in step])
            self._planner.measure(step, time.monotonic() - started)
            events = self._process(step, logits_RV)
        except Exception as error:  # the pass is shared: all its sequences fail, others may still succeed
            logger.exception("an engine step failed")
            message = f"{type(error).__name__}: {error}"
            events = {sequence: [SequenceFailed(sequence.request.index, message)] for sequence, _ in step}
        events_by_sink: dict[Sink, list[EngineEvent]] = {}
        for sequence, own in events.items():
            if num_ended(own):
                self._release(sequence, discard=isinstance(own[-1], SequenceFailed))
            if own:
                events_by_sink.setdefault(sequence.sink, []).extend(own)
        for sink, batch in events_by_sink.items():
            sink(batch)

    def _process(self, step: Step, logits_RV: Tensor) -> dict[DecodingSequence, list[EngineEvent]]:
        """Turn a step's logits into events, and sample the next token of every sequence that continues."""
        events: dict[DecodingSequence, list[EngineEvent]] = {}
        to_sample: list[tuple[DecodingSequence, int]] = []  # with its row of logits
        row = 0
        for sequence, chunk in step:
            self._slots.feed(sequence.slot, chunk.tokens)
            events[sequence] = sequence.take_logits(chunk, logits_RV[row : row + chunk.num_logits])
            row += chunk.num_logits
            if not (sequence.in_prompt or num_ended(events[sequence])):
                to_sample.append((sequence, row - 1))
        if to_sample:
            rows = [row for _, row in to_sample]
            # Usually these are all rows, which then need no copy.
            sampled_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
            tokens = sample(sampled_RV, [sequence.sampler for sequence, _ in to_sample])
            num_logprobs = [sequence.request.sampling.num_logprobs for sequence, _ in to_sample]
            scores = score_sampled(sampled_RV, tokens, num_logprobs)
            for (sequence, _), token, score in zip(to_sample, tokens, scores, strict=True):
                events[sequence] += sequence.take_token(token, score, self._end_tokens)
        return events
