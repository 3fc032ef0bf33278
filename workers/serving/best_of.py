"""``best_of``: of a prompt's candidates, the ones that the model finds likeliest per token."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from workers.serving.generation import Answer, Discarded, Finished, Generation, Started, Token


def choose_best(answer: Sequence[Answer], request: Generation) -> list[Answer]:
    """Of a whole answer, ``n`` of every prompt's candidates as its choices, the likeliest first and then the earliest, and
    what was sampled for the others.
    """
    tokens: defaultdict[int, list[Token]] = defaultdict(list)
    ends: dict[int, Finished] = {}
    for item in answer:
        if isinstance(item, Token):
            tokens[item.index].append(item)
        elif isinstance(item, Finished):
            ends[item.index] = item
    best: list[Answer] = [item for item in answer if isinstance(item, Started)]
    num_discarded = 0
    for prompt in range(len(request.prompts)):
        first = prompt * request.num_candidates
        candidates = range(first, first + request.num_candidates)
        likeliest = sorted(
            candidates, key=lambda index: _mean_logprob(tokens[index], ends[index]), reverse=True
        )
        for choice, index in enumerate(likeliest[: request.n], start=prompt * request.n):
            best += [replace(token, index=choice) for token in tokens[index]]
            best.append(replace(ends[index], index=choice))
        num_discarded += sum(ends[index].num_tokens for index in likeliest[request.n :])
    return [*best, Discarded(num_discarded)]


def _mean_logprob(tokens: Sequence[Token], end: Finished) -> float:
    """Of the tokens that were sampled, which come after those of an echoed prompt; 0 where there are none."""
    sampled = tokens[len(tokens) - end.num_tokens :]
    return sum(token.logprob for token in sampled if token.logprob is not None) / max(len(sampled), 1)
