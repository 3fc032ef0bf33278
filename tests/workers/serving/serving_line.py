"""The model line that the tests of the OpenAI interface speak to."""

import time

from service.core.serving import ServedTarget
from workers.serving.local_serving import LocalServing

PROMPT = "The cat sat on"
LINE = ServedTarget("line", 1, "export/1")
UNRELEASED = ServedTarget("unreleased", None, None)
COMPLETION = {"model": "line", "prompt": "a", "max_tokens": 1}


def settle(serving: LocalServing, *targets: ServedTarget) -> None:
    serving.apply(targets)
    deadline = time.monotonic() + 30
    while any(serving.observe()[target.model][0].number != target.number for target in targets):
        assert time.monotonic() < deadline
        time.sleep(0.01)
