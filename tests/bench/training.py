"""Our training loop beside the Hugging Face Trainer: same model, data, batch, threads and precision.

    python -m tests.bench.training [--preset llama-7m] [--rows 16] [--length 256] [--steps 8] [--compile]

Each is measured in processes of its own, in turn, and the first two steps are left out. On a machine that is
shared, the processor seconds a step are the figure to trust: the wall-clock tells what the neighbours did.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 2
VOCAB_SIZE = 8192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-7m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true", help="compile in our loop")
    parser.add_argument("--only", choices=["ours", "trainer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        seconds = (_ours if options.only == "ours" else _trainer)(options)
        print(json.dumps(seconds))
        return
    measured: dict[str, list[tuple[float, float]]] = {"ours": [], "trainer": []}
    for _ in range(options.rounds):
        for name, steps in measured.items():
            command = [sys.executable, "-m", "tests.bench.training", *sys.argv[1:], "--only", name]
            quiet = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=True)
            steps += json.loads(done.stdout.splitlines()[-1])
    tokens = options.rows * options.length
    print(f"{options.preset}, {options.rows} x {options.length} tokens, {options.threads} threads, fp32")
    rates = {}
    for name, steps in measured.items():
        median = statistics.median(step[0] for step in steps)
        best = min(step[0] for step in steps)
        processor = statistics.median(step[1] for step in steps)
        rates[name] = (tokens / median, tokens / best, tokens / processor)
        print(
            f"{name:8}{tokens / median:7.0f} tokens/s, {tokens / best:.0f} in the best step; "
            f"{processor:.2f} processor seconds a step"
        )
    median, best, processor = (ours / other for ours, other in zip(*rates.values(), strict=True))
    print(f"ours / trainer: {median:.2f}, {best:.2f} in the best steps, {processor:.2f} by the processor")


class _Steps:
    """Wall and processor seconds of every step but the first ones."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._marks.append((time.perf_counter(), usage.ru_utime + usage.ru_stime))

    def seconds(self) -> list[tuple[float, float]]:
        pairs = list(zip(self._marks, self._marks[1:], strict=False))[WARM_UP_STEPS:]
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def _line(options: argparse.Namespace) -> Any:
    from service.core.specs import ArchitectureSpec
    from service.core.stage_specs import Numerics
    from tests.support.specs import line_spec

    return line_spec(
        architecture=ArchitectureSpec(preset=options.preset),
        numerics=Numerics(threads=options.threads, compile=options.compile),
        sequence_length=options.length,
        batch_rows=options.rows,
        warmup_steps=0,
    )


def _ours(options: argparse.Namespace) -> list[tuple[float, float]]:
    import numpy as np

    from service.artifacts import Artifacts
    from service.core.plan import trunk_key
    from service.core.stage_specs import LedgerEntry, TrainStage
    from workers.data.pack import write_pack
    from workers.data.tokenizer import EncodedBlock
    from workers.training.loop import train

    steps = _Steps()
    rows = (options.steps + WARM_UP_STEPS + 1) * options.rows
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, rows * options.length)
    with tempfile.TemporaryDirectory() as root:
        artifacts = Artifacts(Path(root))
        line = _line(options)
        _publish(
            artifacts, line.tokenizer_key, {"vocab_size": VOCAB_SIZE, "end_of_text": 0}, lambda folder: None
        )
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
            checkpoint_every=10_000,
        )
        train(
            stage,
            key=trunk_key(line, ledger, stage.to_step),
            stage_id="bench",
            artifacts=artifacts,
            report=lambda point: steps.mark(),
            should_stop=lambda: False,
        )
    return steps.seconds()


def _publish(artifacts: Any, key: str, result: dict[str, Any], write: Callable[[Path], Any]) -> None:
    with artifacts.writing(key) as folder:
        write(folder)
        artifacts.publish(key, folder, result)


def _trainer(options: argparse.Namespace) -> list[tuple[float, float]]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from workers.training.model import TokenizerFacts, build_model

    torch.set_num_threads(options.threads)
    steps = _Steps()
    line = _line(options)
    count = options.steps + WARM_UP_STEPS + 1
    rows = torch.randint(0, VOCAB_SIZE, (count * options.rows, options.length))

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.mark()

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
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(
            model=build_model(line, TokenizerFacts(VOCAB_SIZE, 0)),
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[Marks()],
        ).train()
    return steps.seconds()


if __name__ == "__main__":
    main()
