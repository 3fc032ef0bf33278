"""Start an update: resolve its model line once, and write part one of the plan (tokenizer, packs)."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from service.core.executor import Executor
from service.core.plan import DataRef, PlannedStage, pack_key, plan_packs, plan_tokenizer, topological
from service.core.specs import ArchitectureSpec, ModelSpec, TokenizerTrainSpec
from service.core.stage_specs import LineSpec, Numerics, PackStage, StageKind, TokenizerStage
from service.core.states import StageState, UpdateState
from service.planning.line import resolve_numerics
from service.store import datasets, lines, models, stages, updates
from service.store.database import Database, now
from service.store.tables import Model, Stage, Update


def start_update(database: Database, executor: Executor, update_id: str) -> bool:
    """Move a pending update to running and write its first stages. False where it is not pending any more.

    Raises Unavailable when the line is not resolved yet and the executor cannot say what the hardware is.
    """
    with database.reading() as session:
        update = updates.update(session, update_id)
        model = models.by_id(session, update.model_id)
        spec = ModelSpec.model_validate(model.spec)
        resolved = model.line is not None
    # Asked outside the transaction: it goes to the cluster, and may take its time to measure.
    numerics = (
        None if resolved else resolve_numerics(spec.training, executor.capabilities(spec.training.workers))
    )
    with database.transaction() as session:
        update = updates.update(session, update_id)
        if not updates.move(session, update, UpdateState.RUNNING):
            return False
        model = models.by_id(session, update.model_id)
        number = datasets.version_by_id(session, update.data_version_id).number
        data = datasets.ledger_data(session, model.dataset_id, number)
        slice_keys = [row.artifact_key for row in datasets.given_slices(session, model.dataset_id)]
        if model.line is None:
            assert numerics is not None
            tokenizer = _first_tokenizer(model, spec, data, slice_keys)
            assert tokenizer.key is not None
            line = resolve_line(spec, model.base_key, tokenizer.key, numerics)
            model.line = line.model_dump(mode="json")
        else:
            line = LineSpec.model_validate(model.line)
            tokenizer = _known_tokenizer(session, line)
        packs = plan_packs(
            tokenizer_key=line.tokenizer_key,
            data=data,
            slice_keys=slice_keys,
            sequence_length=line.sequence_length,
            needs=[tokenizer.name],
        )
        packs = _keep_packs_that_were_read(session, model, spec, packs)
        write_stages(session, update, [tokenizer, *packs])
    return True


def resolve_line(spec: ModelSpec, base_key: str | None, tokenizer_key: str, numerics: Numerics) -> LineSpec:
    """What of a model decides its bits."""
    training = spec.training
    micro = training.micro_batch_tokens
    return LineSpec(
        architecture=ArchitectureSpec(base=base_key) if base_key else spec.architecture,
        tokenizer_key=tokenizer_key,
        numerics=numerics,
        sequence_length=training.sequence_length,
        batch_rows=training.batch_rows,
        micro_batch_rows=max(1, micro // training.sequence_length) if micro else None,
        peak_lr=training.peak_lr,
        warmup_steps=training.warmup_steps,
        optimizer=training.optimizer,
        betas=training.betas,
        weight_decay=training.weight_decay,
        grad_clip=training.grad_clip,
        replay_mixture=training.replay_mixture,
        epochs=training.epochs,
        seed=training.seed,
    )


def write_stages(session: Session, update: Update, planned: Sequence[PlannedStage]) -> None:
    """Add stages to an update. What they need may be among them or among the stages that it has already."""
    at = now(session)
    existing = {stage.name: stage for stage in updates.stages(session, update.id)}
    by_name = {stage.name: stage for stage in planned}
    inside = {name: [need for need in stage.needs if need in by_name] for name, stage in by_name.items()}
    ids = {name: stage.id for name, stage in existing.items()}
    succeeded = {stage.id for stage in existing.values() if stage.state == StageState.SUCCEEDED}
    for position, name in enumerate(topological(inside), start=len(existing)):
        stage = by_name[name]
        needs = [ids[need] for need in stage.needs]
        is_ready = succeeded.issuperset(needs)
        row = Stage(
            update_id=update.id,
            position=position,
            name=name,
            kind=stage.kind,
            spec=stage.spec,
            key=stage.key,
            needs=needs,
            state=StageState.READY if is_ready else StageState.PENDING,
            ready_at=at if is_ready else None,
            created_at=at,
        )
        session.add(row)
        session.flush()
        ids[name] = row.id


def _first_tokenizer(
    model: Model, spec: ModelSpec, data: Sequence[DataRef], slice_keys: Sequence[str]
) -> PlannedStage:
    train = spec.tokenizer.train if spec.tokenizer else None
    return plan_tokenizer(
        vocab_size=(train or TokenizerTrainSpec()).vocab_size,
        source_key=model.base_key or model.tokenizer_source_key,
        data=data,
        slice_keys=slice_keys,
    )


def _known_tokenizer(session: Session, line: LineSpec) -> PlannedStage:
    spec = stages.spec_by_key(session, line.tokenizer_key)
    return PlannedStage(
        name="tokenizer",
        kind=StageKind.TOKENIZER,
        needs=(),
        spec=TokenizerStage.model_validate(spec).model_dump(mode="json"),
        key=line.tokenizer_key,
    )


def _keep_packs_that_were_read(
    session: Session, model: Model, spec: ModelSpec, packs: Sequence[PlannedStage]
) -> list[PlannedStage]:
    """Versions that the line has read stay packed as they were, though slices given since would pack them otherwise."""
    trunk, newest = lines.trunk(session, model.id), lines.newest_version(session, model)
    read_up_to = trunk.data_version if trunk else 0
    if newest is not None and spec.paradigm.name != "from_scratch":  # which reads everything anew
        read_up_to = max(read_up_to, newest.data_version)
    read: Mapping[str, dict[str, Any]] = stages.newest_pack_specs(session, model.id, read_up_to)
    kept = []
    for stage in packs:
        was = read.get(stage.name)
        if was is not None:
            key = pack_key(PackStage.model_validate(was))
            stage = stage.model_copy(update={"spec": was, "key": key})
        kept.append(stage)
    return kept
