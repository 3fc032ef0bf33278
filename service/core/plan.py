"""From a ledger of data versions to the stages of one update, in two parts, and the keys under which stages publish.

Part one (tokenizer once, packs) can be written at once; part two needs to know how many steps each version has, which
only the packs tell. Both are pure: the same ledger gives the same stages with the same keys, so work that was done
before, by whichever model, is found by its key and not done again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.core.auto_length import AutoChoice
from service.core.ledger import LedgerEntry, ledger_up_to, total_steps
from service.core.spec import Spec, canonical_json, fingerprint
from service.core.specs import GateSpec, ParadigmSpec
from service.core.stage_specs import (
    LineSpec,
    MergeStage,
    PackStage,
    SliceRef,
    StageKind,
    TokenizerStage,
    TrainStage,
)


class PlannedStage(Spec):
    """One node of an update. ``name`` is unique in the update; ``needs`` names the nodes that must succeed before."""

    name: str
    kind: StageKind
    needs: tuple[str, ...]
    spec: dict[str, Any]
    key: str | None = None  # where it publishes; None for decisions that publish nothing


class DataRef(Spec):
    """A data version as planning sees it."""

    number: int
    key: str


class LineEnd(Spec):
    """Where a line without a trunk stands: the state that its newest version was made from, and what it has read."""

    checkpoint_key: str
    data_version: int
    resumable: bool = True  # whether the optimizer's state is there, too


class BranchFrom(Spec):
    """The trunk checkpoint that a branch on request leaves."""

    checkpoint_key: str
    step: int


class PlanContext(Spec):
    """All that part two of a plan may depend on."""

    line: LineSpec
    model: str
    ledger: tuple[LedgerEntry, ...]
    trunk_step: int  # where the trunk stands: b_(i-1), 0 before the first update
    previous: LineEnd | None = None  # None before the first version
    branch_from: BranchFrom | None = None
    auto_length: AutoChoice | None = None  # where the paradigm's branch chooses its length
    paradigm: ParadigmSpec
    gate: GateSpec
    slices: tuple[SliceRef, ...]
    newest_slice: str | None
    served_number: int | None
    served_export_key: str | None
    served_missing_slices: tuple[SliceRef, ...]
    auto_release: bool
    checkpoint_every: int

    @property
    def total_steps(self) -> int:
        return total_steps(self.ledger)

    @property
    def previous_step(self) -> int:
        """Step of the stream at which the previous version ended."""
        if self.previous is None:
            return 0
        return total_steps([e for e in self.ledger if e.number <= self.previous.data_version])


class Plan(Spec):
    """The stages of part two, and what a reader should know about how they came out."""

    stages: tuple[PlannedStage, ...]
    branch_point: int
    final_step: int
    notes: dict[str, Any]


def tokenizer_key(stage: TokenizerStage) -> str:
    return f"tokenizer/{fingerprint('tokenizer', stage)}"


def pack_key(stage: PackStage) -> str:
    return f"pack/{fingerprint('pack', stage)}"


def trunk_key(line: LineSpec, ledger: Sequence[LedgerEntry], step: int) -> str:
    """Key of the trunk checkpoint at ``step``: it depends on the packs read up to there and on nothing that came later."""
    read = [canonical_json(entry, exclude={"number"}) for entry in ledger_up_to(ledger, step)]
    return f"{trunk_prefix(line)}/{step:09d}-{fingerprint('trunk', line, read, step)}"


def trunk_prefix(line: LineSpec) -> str:
    return f"trunk/{line.fingerprint}"


def run_key(kind: StageKind, stage: TrainStage) -> str:
    """Key of a training stage's end: the trunk's is every model's on that line, any other belongs to what it computes."""
    if kind == StageKind.TRAIN_TRUNK:
        return trunk_key(stage.line, stage.ledger, stage.to_step)
    prefix = "branch" if kind == StageKind.TRAIN_BRANCH else "train"
    return f"{prefix}/{_run_fingerprint(stage)}"


def own_checkpoint_key(stage: TrainStage, step: int) -> str:
    """Key of the checkpoint at ``step`` of a stage that is not the trunk, from which it resumes when interrupted."""
    return f"{own_checkpoint_prefix(stage)}/{step:09d}"


def own_checkpoint_prefix(stage: TrainStage) -> str:
    return f"run-checkpoint/{_run_fingerprint(stage)}"


def checkpoint_key(stage: TrainStage, step: int) -> str:
    """Where a training stage's state at ``step`` is published: the trunk's for all, any other for itself."""
    if stage.path is None:
        return trunk_key(stage.line, stage.ledger, step)
    return own_checkpoint_key(stage, step)


def checkpoint_prefix(stage: TrainStage) -> str:
    """Of the keys of all checkpoints that the stage may go on from; among the trunk's are some that have read other data."""
    return trunk_prefix(stage.line) if stage.path is None else own_checkpoint_prefix(stage)


def checkpoint_step(key: str) -> int:
    """The step in the key of a checkpoint."""
    return int(key.rsplit("/", 1)[1].split("-")[0])


def merge_key(stage: MergeStage) -> str:
    return f"merge/{fingerprint('merge', stage)}"


def _run_fingerprint(stage: TrainStage) -> str:
    # How often it is checkpointed does not change what it computes.
    return fingerprint("run", canonical_json(stage, exclude={"checkpoint_every"}))


def plan_tokenizer(
    *, vocab_size: int | None, source_key: str | None, data: Sequence[DataRef], slice_keys: Sequence[str]
) -> PlannedStage:
    """The tokenizer of a line: trained on the first data version, or taken over from ``source_key``."""
    if source_key is not None:
        stage = TokenizerStage(source_key=source_key)
    else:
        stage = TokenizerStage(
            vocab_size=vocab_size, data_key=data[0].key, slice_keys=tuple(sorted(slice_keys))
        )
    return PlannedStage(
        name="tokenizer",
        kind=StageKind.TOKENIZER,
        needs=(),
        spec=stage.model_dump(mode="json"),
        key=tokenizer_key(stage),
    )


def plan_packs(
    *,
    tokenizer_key: str,
    data: Sequence[DataRef],
    slice_keys: Sequence[str],
    sequence_length: int,
    needs: Sequence[str],
) -> list[PlannedStage]:
    """One pack per data version of the ledger; those that exist already will be found by their keys."""
    stages = []
    for index, version in enumerate(data):
        stage = PackStage(
            data_key=version.key,
            earlier_keys=tuple(earlier.key for earlier in data[:index]),
            slice_keys=tuple(sorted(slice_keys)),
            tokenizer_key=tokenizer_key,
            sequence_length=sequence_length,
        )
        stages.append(
            PlannedStage(
                name=pack_name(version.number),
                kind=StageKind.PACK,
                needs=tuple(needs),
                spec=stage.model_dump(mode="json"),
                key=pack_key(stage),
            )
        )
    return stages


def pack_name(number: int) -> str:
    return f"pack-{number}"


def topological(stages: Mapping[str, Sequence[str]]) -> list[str]:
    """Names in an order in which everything comes after what it needs. Raises ValueError on a cycle or unknown need."""
    order: list[str] = []
    placed: set[str] = set()
    waiting = dict(stages)
    while waiting:
        ready = [name for name, needs in waiting.items() if placed.issuperset(needs)]
        if not ready:
            raise ValueError(f"stages {sorted(waiting)} need each other or something unknown")
        for name in ready:
            order.append(name)
            placed.add(name)
            del waiting[name]
    return order
