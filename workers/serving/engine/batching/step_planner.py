"""Plans the chunks of the next engine step."""

import math
from collections.abc import Sequence

from workers.serving.engine.batching.decoding_sequence import DecodingSequence
from workers.serving.engine.batching.model_runner import PrefillChunk

PREFILL_TOKENS = 496  # prompt tokens per step; with one token each of 16 decoding sequences, 512 rows
MIN_PREFILL_TOKENS = 16
MAX_PROMPT_STEPS = 2  # in a row, while other sequences decode
# Prompt seconds per step. A decoding sequence waits for at most three steps, the last of which includes its
# own token, and a long step would be taken for a hang.
PREFILL_SECONDS = 2.0
# Rows times vocabulary while scoring prompts: 64 MiB, twice that while they are computed.
SCORED_LOGITS = 1 << 24

Step = list[tuple[DecodingSequence, PrefillChunk]]


class StepPlanner:
    """Balances prompts against sequences that decode, by the prefill speed of past steps."""

    def __init__(self, vocab_size: int) -> None:
        self._max_scored_tokens = max(16, SCORED_LOGITS // vocab_size)
        self._num_prompt_steps = 0  # in a row
        self._tokens_per_second = math.inf  # in the last step with at least MIN_PREFILL_TOKENS

    def measure(self, step: Step, seconds: float) -> None:
        """Learn the prefill speed from a finished step."""
        num_tokens = sum(len(chunk.tokens) for _, chunk in step)
        if num_tokens >= MIN_PREFILL_TOKENS:
            self._tokens_per_second = num_tokens / max(seconds, 1e-9)

    def plan(self, active: Sequence[DecodingSequence]) -> Step:
        """The next step: decoding sequences in slot order, then prompts in order of arrival.

        Prompts that one step completes get a step to themselves, because sharing it with the other sequences
        would make it half as long again. At most two such steps follow each other, the second for prompts
        that arrive during the first, so that decoding sequences never wait longer than that.
        """
        decoding = sorted((s for s in active if not s.in_prompt), key=lambda sequence: sequence.slot)
        prompts = self._prompt_chunks(active)
        all_complete = all(len(chunk.tokens) == len(sequence.unfed) for sequence, chunk in prompts)
        num_in_prompt = len(active) - len(decoding)
        may_go_first = bool(decoding) and self._num_prompt_steps < MAX_PROMPT_STEPS
        if may_go_first and 0 < num_in_prompt == len(prompts) and all_complete:
            self._num_prompt_steps += 1
            return prompts
        self._num_prompt_steps = 0
        return [(s, PrefillChunk(s.slot, s.num_fed, s.unfed, 1)) for s in decoding] + prompts

    def _prompt_chunks(self, active: Sequence[DecodingSequence]) -> Step:
        chunks: Step = []
        budget = int(min(max(self._tokens_per_second * PREFILL_SECONDS, MIN_PREFILL_TOKENS), PREFILL_TOKENS))
        scored_budget = self._max_scored_tokens
        for sequence in active:
            if not sequence.in_prompt:
                continue
            num_tokens = min(len(sequence.unfed), budget)
            if sequence.scores_prompt:
                num_tokens = num_logits = min(num_tokens, scored_budget)
                scored_budget -= num_tokens
            else:
                num_logits = int(num_tokens == len(sequence.unfed))
            if num_tokens == 0:
                continue
            budget -= num_tokens
            tokens = sequence.unfed[:num_tokens]
            chunks.append((sequence, PrefillChunk(sequence.slot, sequence.num_fed, tokens, num_logits)))
        return chunks
