"""Plans: the stages of one update, in two parts, and the keys under which stages publish.

Part one, the tokenizer and the packs, can be written at once. Part two needs the number of steps of each
version, which is known only once the packs exist. Both parts are pure: equal ledgers give equal stages with
equal keys, so work that any model has already done is found by its key and not repeated.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.core.auto_length import AutoChoice
from service.core.ledger import LedgerEntry, ledger_up_to, total_steps
from service.core.paradigm_specs import ParadigmSpec
from service.core.spec import Spec, canonical_json, fingerprint
from service.core.specs import GateSpec
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
    """One node of an update.

    ``name`` is unique in the update; ``needs`` names the nodes that must succeed first.
    """

    name: str
    kind: StageKind
    needs: tuple[str, ...]
    spec: dict[str, Any]
    key: str | None = None  # None for decisions, which publish nothing


class DataRef(Spec):
    """A data version as planning sees it: its number and its artifact."""

    number: int
    key: str


class LineEnd(Spec):
    """The end of a line without a trunk: the state of its newest version, from which it continues."""

    checkpoint_key: str
    data_version: int
    resumable: bool = True  # whether it includes the optimizer's state


class BranchFrom(Spec):
    """The trunk checkpoint at which a requested branch starts."""

    checkpoint_key: str
    step: int


class PlanContext(Spec):
    """Everything that part two of a plan depends on.

    The fields from ``slices`` on only shape the evaluation and the release. A forecast, which counts training
    steps alone, leaves them at their defaults.
    """

    line: LineSpec
    model: str
    ledger: tuple[LedgerEntry, ...]
    trunk_step: int  # the trunk's newest step b_(i-1), 0 before the first update
    previous: LineEnd | None = None  # None before the first version
    branch_from: BranchFrom | None = None  # for a requested branch
    auto_length: AutoChoice | None = None  # for a branch length with the rule auto
    paradigm: ParadigmSpec
    gate: GateSpec
    checkpoint_every: int
    slices: tuple[SliceRef, ...] = ()
    newest_slice: str | None = None
    served_number: int | None = None
    served_export_key: str | None = None
    served_missing_slices: tuple[SliceRef, ...] = ()
    auto_release: bool = False

    @property
    def total_steps(self) -> int:
        return total_steps(self.ledger)

    @property
    def previous_step(self) -> int:
        """Step of the stream at which the previous version ended, 0 if there is none."""
        if self.previous is None:
            return 0
        return total_steps([e for e in self.ledger if e.number <= self.previous.data_version])


class Plan(Spec):
    """The stages of part two. ``notes`` explain them to a reader of the update."""

    stages: tuple[PlannedStage, ...]
    branch_point: int
    final_step: int
    notes: dict[str, Any]


def tokenizer_key(stage: TokenizerStage) -> str:
    return f"tokenizer/{fingerprint('tokenizer', stage)}"


def pack_key(stage: PackStage) -> str:
    return f"pack/{fingerprint('pack', stage)}"


def trunk_key(line: LineSpec, ledger: Sequence[LedgerEntry], step: int) -> str:
    """Key of the trunk checkpoint at ``step``.

    It depends on the packs read up to there, and on nothing later.
    """
    read = [canonical_json(entry, exclude={"number"}) for entry in ledger_up_to(ledger, step)]
    return f"{trunk_prefix(line)}/{step:09d}-{fingerprint('trunk', line, read, step)}"


def trunk_prefix(line: LineSpec) -> str:
    return f"trunk/{line.fingerprint}"


def run_key(kind: StageKind, stage: TrainStage) -> str:
    """Key of a training stage's end.

    All models on a line share the trunk's; any other stage is keyed by its own spec.
    """
    if kind == StageKind.TRAIN_TRUNK:
        return trunk_key(stage.line, stage.ledger, stage.to_step)
    prefix = "branch" if kind == StageKind.TRAIN_BRANCH else "train"
    return f"{prefix}/{_run_fingerprint(stage)}"


def own_checkpoint_key(stage: TrainStage, step: int) -> str:
    """Key of the checkpoint from which a stage that is not the trunk resumes after an interruption."""
    return f"{own_checkpoint_prefix(stage)}/{step:09d}"


def own_checkpoint_prefix(stage: TrainStage) -> str:
    return f"run-checkpoint/{_run_fingerprint(stage)}"


def checkpoint_key(stage: TrainStage, step: int) -> str:
    """Key of a training stage's checkpoint at ``step``. All models on a line share the trunk's."""
    if stage.path is None:
        return trunk_key(stage.line, stage.ledger, step)
    return own_checkpoint_key(stage, step)


def checkpoint_prefix(stage: TrainStage) -> str:
    """Prefix of the keys of all checkpoints that the stage may continue from.

    Some trunk checkpoints under the prefix have read other data: compare the whole key.
    """
    return trunk_prefix(stage.line) if stage.path is None else own_checkpoint_prefix(stage)


def checkpoint_step(key: str) -> int:
    """The step in the key of a checkpoint."""
    return int(key.rsplit("/", 1)[1].split("-")[0])


def merge_key(stage: MergeStage) -> str:
    return f"merge/{fingerprint('merge', stage)}"


def _run_fingerprint(stage: TrainStage) -> str:
    # The interval between checkpoints does not change the result.
    return fingerprint("run", canonical_json(stage, exclude={"checkpoint_every"}))


def plan_tokenizer(
    *, vocab_size: int | None, source_key: str | None, data: Sequence[DataRef], slice_keys: Sequence[str]
) -> PlannedStage:
    """The tokenizer of a line, trained on the first data version or copied from ``source_key``."""
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
    """One pack per data version of the ledger. Packs that exist already are found by their keys."""
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
    """Names in an order that puts every name after its needs.

    Raises ValueError on a cycle or an unknown need.
    """
    order: list[str] = []
    placed: set[str] = set()
    waiting = dict(stages)
    while waiting:
        ready = [name for name, needs in waiting.items() if placed.issuperset(needs)]
        if not ready:
            raise ValueError(f"stages {sorted(waiting)} form a cycle or need an unknown stage")
        for name in ready:
            order.append(name)
            placed.add(name)
            del waiting[name]
    return order
