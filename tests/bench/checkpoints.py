"""The cost of periodic checkpoints: the mean training step with and without them.

    python -m tests.bench.checkpoints [--preset llama-7m] [--every 20] [--steps 40]

The two take turns, each in its own process. The mean includes everything: copying the state, the CPU time of
the thread that writes and hashes it, and waiting for the previous checkpoint. The default is a checkpoint
every 200 steps; its cost is the training time that one checkpoint takes, divided by 200 steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.training import WARM_UP_STEPS, parser_of, run_of

DEFAULT_EVERY = 200
NEVER = 10_000


def main() -> None:
    parser = parser_of(__doc__, steps=40)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(_mean_step(options, options.only)))
        return
    without, with_them = [], []
    for _ in range(options.rounds):
        without.append(_run_in_process(NEVER))
        with_them.append(_run_in_process(options.every))
    plain, checkpointed = statistics.median(without), statistics.median(with_them)
    seconds = (checkpointed - plain) * options.every
    print(
        f"{options.preset}, {options.rows} x {options.length} tokens, {options.threads} threads, {options.precision}: "
        f"a step {plain:.4f} s, with a checkpoint every {options.every} steps {checkpointed:.4f} s "
        f"({checkpointed / plain - 1:+.1%}); a checkpoint takes {seconds:.2f} s of training, "
        f"{seconds / DEFAULT_EVERY / plain:.2%} of the steps at one every {DEFAULT_EVERY}"
    )
    print(
        "rounds without:",
        *(f"{step:.4f}" for step in without),
        " with:",
        *(f"{step:.4f}" for step in with_them),
    )


def _run_in_process(every: int) -> float:
    command = [sys.executable, "-m", "tests.bench.checkpoints", *sys.argv[1:], "--only", str(every)]
    quiet = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _mean_step(options: argparse.Namespace, every: int) -> float:
    """The mean over whole intervals between checkpoints, without the first one."""
    from service.artifacts import LocalArtifacts
    from workers.stages import run_stage
    from workers.stages.context import StageContext

    ends: list[float] = []
    # The first interval is warm-up. One more step after the last interval waits for its checkpoint.
    options.steps = options.every * (1 + options.steps // options.every) - WARM_UP_STEPS
    with tempfile.TemporaryDirectory() as root:
        artifacts = LocalArtifacts(Path(root))
        [call] = run_of(options, artifacts, every).calls
        run_stage(
            call, StageContext(artifacts, lambda point: ends.append(time.perf_counter()), lambda: False)
        )
    return (ends[-1] - ends[options.every]) / (len(ends) - 1 - options.every)


if __name__ == "__main__":
    main()
