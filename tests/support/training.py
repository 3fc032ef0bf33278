"""A line that is small enough to train in a test: 31 thousand parameters, rows of 32 tokens."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import zstandard

from service.artifacts import Artifacts
from service.core.artifact_files import DOCUMENTS, HASHES, HOLDOUT, HOLDOUT_HASHES
from service.core.executor import Point, StageCall
from service.core.ledger import LedgerEntry, steps_of
from service.core.manifest import Manifest
from service.core.plan import pack_key, run_key, tokenizer_key, trunk_key
from service.core.specs import ArchitectureSpec
from service.core.stage_specs import (
    LineSpec,
    PackStage,
    RunPath,
    StageKind,
    TokenizerStage,
    TrainStage,
)
from service.ingest.documents import document_hash
from tests.support.specs import line_spec
from workers.stages import run_stage
from workers.stages.context import StageContext

SMALL_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def texts_of(seed: int, documents: int, *, words: int = 40) -> list[str]:
    """Write documents in which each word limits the next one, by a rule of the seed, so a model can learn."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices("abdeiklmnorstu", k=draw.randint(2, 6))) for _ in range(40)]
    follows = {word: draw.sample(lexicon, 3) for word in lexicon}
    texts = []
    for number in range(documents):
        text = [draw.choice(lexicon)]
        while len(text) < words:
            text.append(draw.choice(follows[text[-1]]))
        texts.append(f"{number} " + " ".join(text))
    return texts


def publish_documents(artifacts: Artifacts, texts: Sequence[str], *, holdout: float = 0.1) -> str:
    """Publish distinct documents as a data version's artifact, as ingestion does. Returns its key."""
    hashes = {document_hash(text): text for text in texts}
    held_out = sorted(hashes)[: round(holdout * len(hashes))]
    key = f"data/{hashlib.sha256(b''.join(hashes)).hexdigest()}"
    with artifacts.writing(key) as directory:
        (directory / HASHES).write_bytes(b"".join(sorted(hashes)))
        (directory / HOLDOUT_HASHES).write_bytes(b"".join(held_out))
        for name, kept in ((DOCUMENTS, texts), (HOLDOUT, [hashes[digest] for digest in held_out])):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in kept)
            (directory / name).write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
        artifacts.publish(key, directory, {})
    return key


STATE_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def content(artifacts: Artifacts, manifest: Manifest) -> dict[str, bytes]:
    """Read the state files, and the points without the fields that depend on the clock."""
    folder = artifacts.open(manifest.key)
    files = {name: (folder / name).read_bytes() for name in STATE_FILES if (folder / name).exists()}
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for point in points:
        del point["tokens_per_second"]
    return files | {"points": json.dumps(points).encode()}


@dataclass
class Trainer:
    """Runs stages in this process. ``stop_at`` is the global step at which they are asked to stop."""

    artifacts: Artifacts
    points: list[Point] = field(default_factory=list)
    stop_at: int | None = None

    def run(self, kind: StageKind, key: str, spec: Any) -> Manifest:
        call = StageCall("stage", 1, kind, key, spec.model_dump(mode="json"))
        return run_stage(call, StageContext(self.artifacts, self.points.append, self._should_stop))

    def trunk(self, stage: TrainStage) -> Manifest:
        return self.train(stage, StageKind.TRAIN_TRUNK)

    def branch(self, stage: TrainStage) -> Manifest:
        return self.train(stage, StageKind.TRAIN_BRANCH)

    def train(self, stage: TrainStage, kind: StageKind = StageKind.TRAIN) -> Manifest:
        return self.run(kind, run_key(kind, stage), stage)

    def _should_stop(self) -> bool:
        # A stage asks during a step, before it reports it.
        return self.stop_at is not None and (self.points[-1].step if self.points else 0) + 1 >= self.stop_at


@dataclass(frozen=True)
class SmallLine:
    """A line and the ledger of its packed data versions."""

    line: LineSpec
    ledger: tuple[LedgerEntry, ...]
    data_keys: tuple[str, ...]


def prepare_line(
    artifacts: Artifacts, documents: Sequence[int] = (60, 60), *, vocab_size: int = 320, **changes: Any
) -> SmallLine:
    """Publish a data version for each number of documents, and run the tokenizer and pack stages."""
    trainer = Trainer(artifacts)
    data_keys: list[str] = []
    for seed, count in enumerate(documents, start=1):
        data_keys.append(publish_documents(artifacts, texts_of(seed, count)))
    tokenizer = TokenizerStage(vocab_size=vocab_size, data_key=data_keys[0])
    trainer.run(StageKind.TOKENIZER, tokenizer_key(tokenizer), tokenizer)
    values = {
        "architecture": ArchitectureSpec(config=SMALL_CONFIG),
        "tokenizer_key": tokenizer_key(tokenizer),
        "sequence_length": 32,
        "batch_rows": 8,
        "peak_lr": 3e-3,
        "warmup_steps": 3,
    }
    line = line_spec(**(values | changes))
    ledger = []
    for number, key in enumerate(data_keys, start=1):
        stage = PackStage(
            data_key=key,
            earlier_keys=tuple(data_keys[: number - 1]),
            slice_keys=(),
            tokenizer_key=line.tokenizer_key,
            sequence_length=line.sequence_length,
        )
        rows = trainer.run(StageKind.PACK, pack_key(stage), stage).result["rows"]
        steps = steps_of(rows, line.batch_rows, line.epochs)
        ledger.append(LedgerEntry(number=number, pack_key=pack_key(stage), rows=rows, steps=steps))
    return SmallLine(line, tuple(ledger), tuple(data_keys))


def trunk_stage(
    small: SmallLine, to_step: int, *, from_step: int = 0, checkpoint_every: int = 1000
) -> TrainStage:
    return TrainStage(
        line=small.line,
        ledger=small.ledger[:1] if to_step <= small.ledger[0].steps else small.ledger,
        from_step=from_step,
        to_step=to_step,
        start_key=trunk_key(small.line, small.ledger, from_step) if from_step else None,
        checkpoint_every=checkpoint_every,
    )


def branch_stage(
    small: SmallLine, from_step: int, steps: int, *, checkpoint_every: int = 1000, **changes: Any
) -> TrainStage:
    path = RunPath(**({"decay_steps": steps, "stream_steps": steps} | changes))
    within = from_step + path.stream_steps <= small.ledger[0].steps
    return TrainStage(
        line=small.line,
        ledger=small.ledger[:1] if within else small.ledger,
        from_step=from_step,
        to_step=from_step + steps,
        start_key=trunk_key(small.line, small.ledger, from_step),
        path=path,
        checkpoint_every=checkpoint_every,
    )
