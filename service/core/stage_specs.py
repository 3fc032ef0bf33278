"""What a model line is to its workers, and what every kind of stage is asked to do: the JSON that goes with a run.

``LineSpec`` is what of a model, resolved once, decides the bits of its line. Stages name their inputs by artifact key, so a
stage's fingerprint covers everything that went into it.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Literal

from service.core.ledger import LedgerEntry
from service.core.spec import Spec, fingerprint
from service.core.specs import ArchitectureSpec, GateSpec

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
    TRAIN = "train"
    MERGE = "merge"
    EXPORT = "export"
    EVALUATE = "evaluate"
    GATE = "gate"
    RELEASE = "release"


TRAINING_KINDS = frozenset({StageKind.TRAIN_TRUNK, StageKind.TRAIN_BRANCH, StageKind.TRAIN})
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


class RunPath(Spec):
    """How a stage goes that is not the trunk: a branch that leaves it, or a run of its own.

    Rate, H being the line's peak: ``warmup_steps`` rise linearly from ``warmup_from``·H to H, ``hold_steps`` stay at
    ``level``·H, and ``decay_steps`` fall from H to ``floor``·H in the ``shape``. Rows: of the next ``stream_steps`` of the
    line's stream, replay mixed in; or ``shuffled``, every row of the ledger in one order. A ``resumable`` end keeps
    the optimizer's state, for a stage that goes on from it.
    """

    warmup_steps: int = 0
    warmup_from: float = 0.0
    hold_steps: int = 0
    level: float = 1.0
    decay_steps: int = 0
    shape: str = "1-sqrt"
    floor: float = 0.0
    cuts: tuple[float, ...] = ()
    beta2: float | None = None
    fresh_optimizer: bool = False
    resumable: bool = False
    order: Literal["stream", "shuffled"] = "stream"
    stream_steps: int
    replay_fraction: float = 0.0
    replay_budget: Literal["grown", "kept"] = "grown"

    @property
    def steps(self) -> int:
        return self.warmup_steps + self.hold_steps + self.decay_steps


class TrainStage(Spec):
    """Train the line from ``from_step`` of its stream to ``to_step``: the trunk where there is no ``path``.

    ``ledger`` holds the data versions up to the one the last step lies in, and nothing after it.
    """

    line: LineSpec
    ledger: tuple[LedgerEntry, ...]
    from_step: int
    to_step: int
    start_key: str | None  # the state at ``from_step``; None: initial weights at step 0
    path: RunPath | None = None
    checkpoint_every: int

    @property
    def total_steps(self) -> int:
        return self.to_step - self.from_step


class MergeStage(Spec):
    """Weighted sum of the weights of checkpoints, the oldest first. ``weights`` add up to 1."""

    line: LineSpec
    checkpoint_keys: tuple[str, ...]
    weights: tuple[float, ...]


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


def artifact_keys(document: Any) -> Iterator[str]:
    """Every string in a JSON document, a spec: what of it is an artifact's key is among them."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from artifact_keys(value)
    elif isinstance(document, list):
        for value in document:
            yield from artifact_keys(value)
