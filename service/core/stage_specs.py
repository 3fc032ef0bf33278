"""Specs of a model line and of each kind of stage: the JSON that workers receive with a run.

Stages name their inputs by artifact key, so a stage's fingerprint covers everything that went into it.
"""

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Literal

from service.core.ledger import LedgerEntry
from service.core.paradigm_specs import Decay
from service.core.spec import ArtifactKey, Spec, fingerprint
from service.core.specs import ArchitectureSpec, GateSpec, TrainingRecipe

# --- what decides the bits of a line ------------------------------------------------------------------------


class Numerics(Spec):
    """Everything outside a model's own description that changes bits, resolved once per line."""

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    threads: int = 1  # intra-op threads of one training process
    attention: str = "sdpa"
    deterministic: bool = True


class LineSpec(TrainingRecipe):
    """The identity of a model line: two lines with equal specs share every stage."""

    architecture: ArchitectureSpec  # ``base`` is an artifact key here
    tokenizer_key: ArtifactKey
    numerics: Numerics
    batch_rows: int  # rows of one optimizer step, over all workers
    micro_batch_rows: int | None  # rows per forward pass; None for all rows of a process at once

    @property
    def fingerprint(self) -> str:
        return fingerprint("line", self)

    def artifact_keys(self) -> Iterator[str]:
        yield from super().artifact_keys()
        # Only here: in a model's own spec, ``base`` is the path that the user gave.
        if self.architecture.base is not None:
            yield self.architecture.base


# --- stages -------------------------------------------------------------------------------------------------


class StageKind(StrEnum):
    TOKENIZER = "tokenizer"
    PACK = "pack"
    TRAIN_TRUNK = "train_trunk"
    TRAIN_BRANCH = "train_branch"
    TRAIN = "train"
    MERGE = "merge"
    EXPORT = "export"
    EVALUATE = "evaluate"
    GATE = "gate"  # the orchestrator decides it, without a run
    RELEASE = "release"  # ends with its release, without a run


TRAINING_KINDS = frozenset({StageKind.TRAIN_TRUNK, StageKind.TRAIN_BRANCH, StageKind.TRAIN})


class TokenizerStage(Spec):
    """Train a byte-level BPE on the training documents of one data version, or copy an existing tokenizer."""

    vocab_size: int | None = None
    data_key: ArtifactKey | None = None
    slice_keys: tuple[ArtifactKey, ...] = ()
    source_key: ArtifactKey | None = None  # artifact that holds a tokenizer.json


class PackStage(Spec):
    """Tokenise the training documents of one data version into rows of ``sequence_length`` tokens."""

    data_key: ArtifactKey
    earlier_keys: tuple[ArtifactKey, ...]  # data versions whose documents count as duplicates here
    slice_keys: tuple[ArtifactKey, ...]  # uploaded slices, whose documents are kept out of training
    tokenizer_key: ArtifactKey
    sequence_length: int


class RunPath(Decay):
    """The rates and rows of a training stage that is not the trunk: a branch, or a run of its own.

    Rates: with H the line's peak rate, ``warmup_steps`` rise linearly from ``warmup_from``·H to H,
    ``hold_steps`` stay at ``level``·H, and ``decay_steps`` fall from H to ``floor``·H in the given ``shape``.

    Rows: the next ``stream_steps`` steps of the line's stream, with replayed rows mixed in; or, if the order
    is "shuffled", every row of the ledger in one order.

    A ``resumable`` stage keeps the optimizer's state at its end, for a stage that continues from it.
    """

    warmup_steps: int = 0
    warmup_from: float = 0.0
    hold_steps: int = 0
    level: float = 1.0
    decay_steps: int = 0
    fresh_optimizer: bool = False
    resumable: bool = False
    order: Literal["stream", "shuffled"] = "stream"
    stream_steps: int

    @property
    def steps(self) -> int:
        return self.warmup_steps + self.hold_steps + self.decay_steps


class TrainStage(Spec):
    """Train the line from step ``from_step`` of its stream to ``to_step``, along the trunk or along ``path``.

    ``ledger`` ends with the data version that the last step lies in. ``checkpoint_every`` is in steps.
    """

    line: LineSpec
    ledger: tuple[LedgerEntry, ...]
    from_step: int
    to_step: int
    start_key: ArtifactKey | None  # the state at ``from_step``; None for initial weights at step 0
    path: RunPath | None = None
    checkpoint_every: int

    @property
    def total_steps(self) -> int:
        return self.to_step - self.from_step


class MergeStage(Spec):
    """Add up the weights of checkpoints, oldest first, each times its share in ``weights``.

    The shares sum to 1.
    """

    line: LineSpec
    checkpoint_keys: tuple[ArtifactKey, ...]
    weights: tuple[float, ...]


class ExportStage(Spec):
    """Write the weights of a checkpoint in the Hugging Face layout."""

    line: LineSpec
    checkpoint_key: ArtifactKey


class SliceRef(Spec):
    """A slice: the file ``file`` of the artifact ``key``."""

    name: str
    key: ArtifactKey
    file: str
    data_version: int | None = None


class EvaluateStage(Spec):
    """Measure the export on every slice, and the served version on those where it was not measured yet."""

    export_key: ArtifactKey
    slices: tuple[SliceRef, ...]
    served_export_key: ArtifactKey | None
    served_slices: tuple[SliceRef, ...]
    sequence_length: int
    numerics: Numerics


class GateStage(Spec):
    """Compare the candidate with the version that was served when the plan was written."""

    gate: GateSpec
    newest_slice: str | None
    served_number: int | None


class ReleaseStage(Spec):
    """Release the candidate of the model and wait until it is live."""

    model: str


STAGE_SPECS: Mapping[StageKind, type[Spec]] = {
    StageKind.TOKENIZER: TokenizerStage,
    StageKind.PACK: PackStage,
    StageKind.TRAIN_TRUNK: TrainStage,
    StageKind.TRAIN_BRANCH: TrainStage,
    StageKind.TRAIN: TrainStage,
    StageKind.MERGE: MergeStage,
    StageKind.EXPORT: ExportStage,
    StageKind.EVALUATE: EvaluateStage,
    StageKind.GATE: GateStage,
    StageKind.RELEASE: ReleaseStage,
}


def parse_stage_spec(kind: str, document: Mapping[str, Any]) -> Spec:
    """The spec of a stage from its stored JSON. Raises pydantic's ValidationError."""
    return STAGE_SPECS[StageKind(kind)].model_validate(document)


# --- holdouts as slices -------------------------------------------------------------------------------------


def holdout_name(number: int) -> str:
    """Name of the slice made of the holdout of data version ``number``."""
    return f"v{number}"


def is_holdout_name(name: str) -> bool:
    """Whether ``name`` is reserved for the holdout of some data version."""
    return re.fullmatch(r"v[0-9]+", name) is not None
