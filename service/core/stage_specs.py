"""What a model line is to its workers, and what every kind of stage is asked to do: the JSON that goes with a run.

``LineSpec`` is what of a model, resolved once, decides the bits of its line. Stages name their inputs by artifact key, so a
stage's fingerprint covers everything that went into it.
"""

import math
from enum import StrEnum
from typing import Literal

from service.core.specs import ArchitectureSpec, GateSpec, Spec, fingerprint

# --- what decides the bits of a line ----------------------------------------------------------------------------------


class Numerics(Spec):
    """Everything outside the model's own description that changes bits, resolved once per line."""

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    threads: int = 1
    attention: str = "sdpa"
    deterministic: bool = True


class LineSpec(Spec):
    """The identity of a model line: two lines with equal specs share every stage."""

    architecture: ArchitectureSpec  # ``base`` is an artifact key here
    tokenizer_key: str
    numerics: Numerics
    sequence_length: int
    batch_rows: int
    micro_batch_rows: int | None
    peak_lr: float
    warmup_steps: int
    optimizer: str
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    replay_mixture: str
    epochs: int
    seed: int

    @property
    def fingerprint(self) -> str:
        return fingerprint("line", self)


# --- stages -----------------------------------------------------------------------------------------------------------


class StageKind(StrEnum):
    TOKENIZER = "tokenizer"
    PACK = "pack"
    TRAIN_TRUNK = "train_trunk"
    TRAIN_BRANCH = "train_branch"
    EXPORT = "export"
    EVALUATE = "evaluate"
    GATE = "gate"
    RELEASE = "release"


TRAINING_KINDS = frozenset({StageKind.TRAIN_TRUNK, StageKind.TRAIN_BRANCH})
IN_ORCHESTRATOR_KINDS = frozenset(
    {StageKind.GATE, StageKind.RELEASE}
)  # decisions about rows: nothing to execute


class TokenizerStage(Spec):
    """Train a byte-level BPE on the training documents of one data version, or take over a given one."""

    vocab_size: int | None = None
    data_key: str | None = None
    slice_keys: tuple[str, ...] = ()
    source_key: str | None = None  # artifact that holds a tokenizer.json


class PackStage(Spec):
    """Tokenise the training documents of one data version into rows of ``sequence_length`` tokens."""

    data_key: str
    earlier_keys: tuple[str, ...]  # data versions whose documents count as duplicates here
    slice_keys: tuple[str, ...]  # given slices, whose documents are kept out of training
    tokenizer_key: str
    sequence_length: int


class LedgerEntry(Spec):
    """One data version as training sees it: its pack, its rows, and its steps T_i."""

    number: int
    pack_key: str
    rows: int
    steps: int


class BranchPath(Spec):
    """The branch's own part of a training stage. ``new_rows_steps`` of its ``steps`` are worth of unread trunk rows."""

    steps: int
    new_rows_steps: int
    shape: str
    floor: float
    cuts: tuple[float, ...]
    beta2: float | None
    replay_fraction: float
    replay_budget: Literal["grown", "kept"]


class TrainStage(Spec):
    """Train the line from the global step ``from_step`` to ``to_step``: the trunk, or a branch that leaves it.

    ``ledger`` holds the data versions up to the one the last step lies in, and nothing after it.
    """

    line: LineSpec
    ledger: tuple[LedgerEntry, ...]
    from_step: int
    to_step: int
    start_key: str | None  # the trunk checkpoint at ``from_step``; None: initial weights at step 0
    branch: BranchPath | None = None
    checkpoint_every: int

    @property
    def total_steps(self) -> int:
        return self.to_step - self.from_step


class ExportStage(Spec):
    line: LineSpec
    checkpoint_key: str


class SliceRef(Spec):
    """A fixed evaluation set: ``file`` inside the artifact ``key``."""

    name: str
    key: str
    file: str
    data_version: int | None = None


class EvaluateStage(Spec):
    """Measure the export on every slice, and the served version on those where it was never measured."""

    export_key: str
    slices: tuple[SliceRef, ...]
    served_export_key: str | None
    served_slices: tuple[SliceRef, ...]
    sequence_length: int
    numerics: Numerics


class GateStage(Spec):
    gate: GateSpec
    newest_slice: str | None
    served_number: int | None


class ReleaseStage(Spec):
    model: str


def steps_of(rows: int, batch_rows: int, epochs: int) -> int:
    """T_i: optimizer steps of a data version. Each pass is filled up from its first rows, and is at least one step."""
    return epochs * max(1, math.ceil(rows / batch_rows))
