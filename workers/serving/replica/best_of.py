"""``best_of``: keeps the candidates of each prompt that the model finds likeliest per token."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from workers.serving.generation import AnswerItem, Discarded, Finished, Generation, Started, Token


def choose_best(answer: Sequence[AnswerItem], request: Generation) -> list[AnswerItem]:
    """Reduce a whole answer to the ``n`` likeliest candidates of each prompt, likeliest first.

    A ``Discarded`` item at the end counts the tokens of the other candidates.
    """
    tokens: defaultdict[int, list[Token]] = defaultdict(list)
    ends: dict[int, Finished] = {}
    for item in answer:
        if isinstance(item, Token):
            tokens[item.index].append(item)
        elif isinstance(item, Finished):
            ends[item.index] = item
    best: list[AnswerItem] = [item for item in answer if isinstance(item, Started)]
    num_discarded = 0
    for prompt in range(len(request.prompts)):
        first = prompt * request.num_candidates
        candidates = range(first, first + request.num_candidates)
        ranked = sorted(candidates, key=lambda index: _mean_logprob(tokens[index], ends[index]), reverse=True)
        for choice, index in enumerate(ranked[: request.n], start=prompt * request.n):
            best += [replace(token, index=choice) for token in tokens[index]]
            best.append(replace(ends[index], index=choice))
        num_discarded += sum(ends[index].num_tokens for index in ranked[request.n :])
    return [*best, Discarded(num_discarded)]


def _mean_logprob(tokens: Sequence[Token], end: Finished) -> float:
    """Average over the sampled tokens, which follow those of an echoed prompt; 0 if there are none."""
    sampled = tokens[len(tokens) - end.num_tokens :]
    return sum(token.logprob for token in sampled if token.logprob is not None) / max(len(sampled), 1)
