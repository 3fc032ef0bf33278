"""Part one of a plan: begin an update, resolve its line if necessary, and write the tokenizer and packs."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.core.executor import Executor
from service.core.plan import DataRef, PlannedStage, pack_key, plan_packs, plan_tokenizer
from service.core.specs import ModelSpec, TokenizerTrainSpec
from service.core.stage_specs import LineSpec, PackStage, StageKind, TokenizerStage
from service.core.states import UpdateState
from service.planning.line import resolve_line, resolve_numerics
from service.planning.stage_rows import write_stages
from service.store import datasets, lines, models, updates
from service.store.database import Database
from service.store.tables import Model


def begin_update(database: Database, executor: Executor, update_id: str) -> bool:
    """Move a pending update to running and write its first stages. Returns False if it is no longer pending.

    Raises Unavailable if the line is not resolved yet and the executor cannot describe its hardware.
    """
    with database.reading() as session:
        update = updates.update(session, update_id)
        model = models.by_id(session, update.model_id)
        spec = ModelSpec.model_validate(model.spec)
        is_resolved = model.line is not None
    # Outside the transaction, because the executor asks the cluster, which may take its time to measure.
    numerics = (
        None if is_resolved else resolve_numerics(spec.training, executor.capabilities(spec.training.workers))
    )
    with database.transaction() as session:
        update = updates.update(session, update_id)
        if not updates.move(session, update, UpdateState.RUNNING):
            return False
        model = models.by_id(session, update.model_id)
        number = datasets.version_by_id(session, update.data_version_id).number
        data = datasets.ledger_data(session, model.dataset_id, number)
        slice_keys = [row.artifact_key for row in datasets.uploaded_slices(session, model.dataset_id)]
        if model.line is None:
            assert numerics is not None
            tokenizer = _first_tokenizer(model, spec, data, slice_keys)
            assert tokenizer.key is not None
            line = resolve_line(spec, model.base_key, tokenizer.key, numerics)
            model.line = line.model_dump(mode="json")
        else:
            line = LineSpec.model_validate(model.line)
            tokenizer = _existing_tokenizer(session, line)
        packs = plan_packs(
            tokenizer_key=line.tokenizer_key,
            data=data,
            slice_keys=slice_keys,
            sequence_length=line.sequence_length,
            needs=[tokenizer.name],
        )
        packs = _keep_packs_already_read(session, model, spec, packs)
        write_stages(session, update, [tokenizer, *packs])
    return True


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


def _existing_tokenizer(session: Session, line: LineSpec) -> PlannedStage:
    spec = lines.spec_by_key(session, line.tokenizer_key)
    return PlannedStage(
        name="tokenizer",
        kind=StageKind.TOKENIZER,
        needs=(),
        spec=TokenizerStage.model_validate(spec).model_dump(mode="json"),
        key=line.tokenizer_key,
    )


def _keep_packs_already_read(
    session: Session, model: Model, spec: ModelSpec, packs: Sequence[PlannedStage]
) -> list[PlannedStage]:
    """Reuse the packs that the line has read already: slices uploaded since then would change them."""
    trunk, newest = lines.trunk(session, model.id), lines.newest_version(session, model)
    read_up_to = trunk.data_version if trunk else 0
    if newest is not None and spec.paradigm.name != "from_scratch":  # from_scratch re-reads all data
        read_up_to = max(read_up_to, newest.data_version)
    read = lines.newest_pack_specs(session, model.id, read_up_to)
    kept = []
    for stage in packs:
        if (earlier_spec := read.get(stage.name)) is not None:
            key = pack_key(PackStage.model_validate(earlier_spec))
            stage = stage.model_copy(update={"spec": earlier_spec, "key": key})
        kept.append(stage)
    return kept
