"""Our training loop, the same loop under Ray Train, and the Hugging Face Trainer: same model, data and batch.

    python -m tests.bench.training [--preset llama-7m] [--rows 16] [--length 256] [--steps 12] [--compile]

The contenders take turns, each in its own process. Under Ray the run goes through the executor, as in a
service (job, worker group, points sent to the board), and the cluster is up only during that turn. The
precision is what a line with the default settings gets on this machine; the Trainer also runs in fp32, its
default. The first steps are not counted. On a shared machine trust CPU seconds per step, because the
wall-clock time depends on other processes.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 2
VOCAB_SIZE = 8192
POLL_SECONDS = 0.5  # the tick of an orchestrator
RAY_SECONDS = 300.0


@dataclass(frozen=True)
class Step:
    """Wall-clock and CPU seconds of one step. CPU seconds are NaN if the step ran in another process."""

    wall: float
    cpu: float = math.nan


def main() -> None:
    parser = parser_of(__doc__, steps=12)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--compile", action="store_true", help="compile in our loop")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        steps = CONTENDERS[options.only](options)[WARM_UP_STEPS:]
        print(json.dumps([asdict(step) for step in steps]))
        return
    if options.precision == "auto":
        options.precision = _precision_here()
    contenders = {
        "loop": ("loop", options.precision),
        "under Ray": ("ray", options.precision),
        "Trainer": ("trainer", "fp32"),
    }
    if options.precision != "fp32":
        contenders[f"Trainer, {options.precision}"] = ("trainer", options.precision)
    measured: dict[str, list[Step]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, (which, precision) in contenders.items():
            measured[name] += _run_in_process(which, precision)
    _show(measured, options)


def parser_of(description: str | None, *, steps: int) -> argparse.ArgumentParser:
    """The options that all benchmarks of the loop share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-7m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def _precision_here() -> str:
    from service.core.specs import TrainingSpec
    from service.planning.line import resolve_numerics
    from workers.executors.capabilities import measure_capabilities

    return resolve_numerics(TrainingSpec(), measure_capabilities(1)).precision


def _run_in_process(which: str, precision: str) -> list[Step]:
    command = [sys.executable, "-m", "tests.bench.training", *sys.argv[1:]]
    quiet = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--precision", precision, "--only", which],
        env=quiet,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Step(**step) for step in json.loads(done.stdout.splitlines()[-1])]


def _show(measured: Mapping[str, list[Step]], options: argparse.Namespace) -> None:
    tokens = options.rows * options.length
    print(
        f"{options.preset}, {options.rows} x {options.length} tokens, {options.threads} threads, "
        f"{options.precision}{', compiled' if options.compile else ''}"
    )
    print(f"{'tokens/s':16}{'median':>10}{'best step':>12}{'per CPU second':>18}{'loop / it':>20}")
    rates = {name: _rates(steps, tokens) for name, steps in measured.items()}
    for name, row in rates.items():
        ratios = " ".join(f"{ours / its:.2f}" for ours, its in zip(rates["loop"], row, strict=True))
        print(f"{name:16}{row[0]:10.0f}{row[1]:12.0f}{row[2]:18.0f}{ratios:>20}")


def _rates(steps: list[Step], tokens: int) -> tuple[float, float, float]:
    """Tokens per second in the median and the best step, and tokens per CPU second in the median step."""
    wall = [step.wall for step in steps]
    cpu = statistics.median(step.cpu for step in steps)
    return tokens / statistics.median(wall), tokens / min(wall), tokens / cpu


class _StepTimer:
    """Measures the time between marks."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._marks.append((time.perf_counter(), usage.ru_utime + usage.ru_stime))

    def steps(self) -> list[Step]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [Step(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def _line(options: argparse.Namespace) -> Any:
    from service.core.specs import ArchitectureSpec
    from service.core.stage_specs import Numerics
    from tests.support.specs import line_spec

    return line_spec(
        architecture=ArchitectureSpec(preset=options.preset),
        numerics=Numerics(
            threads=options.threads, compile=options.compile, precision=options.precision, device="cpu"
        ),
        sequence_length=options.length,
        batch_rows=options.rows,
        warmup_steps=0,
    )


def _num_steps(options: argparse.Namespace) -> int:
    return int(options.steps) + WARM_UP_STEPS + 1


def run_of(options: argparse.Namespace, artifacts: Any, checkpoint_every: int = 10_000) -> Any:
    """Publish a pack and a tokenizer, and return a run of one trunk segment on random tokens."""
    import numpy as np

    from service.core.executor import Run, StageCall
    from service.core.plan import trunk_key
    from service.core.stage_specs import LedgerEntry, StageKind, TrainStage
    from workers.data.pack import write_pack
    from workers.data.tokenizer import EncodedBlock

    line, rows = _line(options), _num_steps(options) * options.rows
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, rows * options.length)
    _publish(artifacts, line.tokenizer_key, {"vocab_size": VOCAB_SIZE, "end_of_text": 0}, lambda folder: None)
    _publish(
        artifacts,
        "pack/p",
        {},
        lambda folder: write_pack(
            folder, [EncodedBlock(ids, 1, 1)], sequence_length=options.length, vocab_size=VOCAB_SIZE
        ),
    )
    ledger = (LedgerEntry(number=1, pack_key="pack/p", rows=rows, steps=rows // options.rows),)
    stage = TrainStage(
        line=line,
        ledger=ledger,
        from_step=0,
        to_step=ledger[0].steps,
        start_key=None,
        checkpoint_every=checkpoint_every,
    )
    key = trunk_key(line, ledger, stage.to_step)
    call = StageCall("bench", 1, StageKind.TRAIN_TRUNK, key, stage.model_dump(mode="json"))
    return Run("run-bench-a1", (call,))


def _publish(artifacts: Any, key: str, result: dict[str, Any], write: Callable[[Path], Any]) -> None:
    with artifacts.writing(key) as folder:
        write(folder)
        artifacts.publish(key, folder, result)


def _loop(options: argparse.Namespace) -> list[Step]:
    from service.artifacts import LocalArtifacts
    from workers.stages import run_stage
    from workers.stages.context import StageContext

    marks = _StepTimer()
    with tempfile.TemporaryDirectory() as root:
        artifacts = LocalArtifacts(Path(root))
        [call] = run_of(options, artifacts).calls
        run_stage(call, StageContext(artifacts, lambda point: marks.mark(), lambda: False))
    return marks.steps()


def _loop_under_ray(options: argparse.Namespace) -> list[Step]:
    """Returns the steps as the loop itself timed them, from the points that reach the board."""
    from service.artifacts import LocalArtifacts
    from service.core.errors import Unavailable
    from service.core.executor import RunState
    from tests.support.ray_cluster import connected, started_ray

    with tempfile.TemporaryDirectory() as root, started_ray() as cluster, connected(cluster):
        from workers.executors.ray_executor import RayExecutor  # imports Ray, which reads its token once

        artifacts = LocalArtifacts(Path(root))
        run = run_of(options, artifacts)
        executor = RayExecutor(artifacts, cluster.dashboard_url)
        deadline = time.monotonic() + RAY_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            try:
                executor.submit(run)  # has no effect on a known run
                report = executor.poll(run.id, 0)
            except Unavailable:
                continue
            if report.state != RunState.RUNNING:
                assert report.state == RunState.SUCCEEDED, report.error
                tokens = options.rows * options.length
                # Without the first step, which the timer of the other contenders does not see either.
                return [Step(tokens / point.tokens_per_second) for point in report.points[1:]]
    raise TimeoutError("the run under Ray did not end")


def _trainer(options: argparse.Namespace) -> list[Step]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from workers.training.model import TokenizerFacts, build_model

    torch.set_num_threads(options.threads)
    marks = _StepTimer()
    line, count = _line(options), _num_steps(options)
    rows = torch.randint(0, VOCAB_SIZE, (count * options.rows, options.length))

    class Marking(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.mark()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.rows,
            max_steps=count,
            learning_rate=line.peak_lr,
            lr_scheduler_type="constant",
            adam_beta2=line.betas[1],
            weight_decay=line.weight_decay,
            max_grad_norm=line.grad_clip,
            bf16=options.precision == "bf16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(
            model=build_model(line, TokenizerFacts(VOCAB_SIZE, 0)),
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[Marking()],
        ).train()
    return marks.steps()


CONTENDERS: Mapping[str, Callable[[argparse.Namespace], list[Step]]] = {
    "loop": _loop,
    "ray": _loop_under_ray,
    "trainer": _trainer,
}


if __name__ == "__main__":
    main()
