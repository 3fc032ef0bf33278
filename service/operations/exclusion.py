"""Excludes a data version: every line that has read it rewinds to before it and leaves it out of later plans."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.core.ledger import total_steps
from service.core.states import FINISHED_UPDATES, CheckpointState, ModelVersionState, UpdateState
from service.store import datasets, events, lines, models, updates
from service.store.database import Database, now
from service.store.tables import Model


@dataclass(frozen=True)
class AffectedVersion:
    """A model version that was trained on the excluded data. If served, it stays served until another is released."""

    model: str
    number: int
    state: ModelVersionState


def exclude_version(database: Database, dataset_name: str, number: int, reason: str) -> list[AffectedVersion]:
    """Exclude a data version permanently from every later plan. Excluding it again keeps the first reason.

    Trunk checkpoints that have read it become abandoned. Its unfinished updates are cancelled, and an update that is
    training later data on top of it starts again. Raises NotFound.
    """
    with database.transaction() as session:
        dataset = datasets.dataset(session, dataset_name, lock=True)
        row = datasets.version(session, dataset.id, number)
        models_of_dataset = models.of_dataset(session, dataset.id)
        if row.excluded_at is None:
            row.excluded_at, row.excluded_reason = now(session), reason
            session.flush()
            events.append(
                session, "data_version.excluded", dataset=dataset_name, data_version=number, reason=reason
            )
            for model in models_of_dataset:
                _rewind(session, model, number)
                _end_updates(session, model, number)
        return [version for model in models_of_dataset for version in _affected(session, model, number)]


def _rewind(session: Session, model: Model, number: int) -> None:
    """Abandon the trunk checkpoints that lie after the first row of the data version."""
    ledger = lines.known_ledger(session, model.id, number)
    if ledger is None or ledger[-1].number != number:
        return
    first_step = total_steps(ledger[:-1])
    live = lines.live_checkpoints(session, model.id)
    abandoned = [row for row in live if row.step > first_step]
    for row in abandoned:
        row.state = CheckpointState.ABANDONED
    session.flush()
    if abandoned:
        head = lines.trunk(session, model.id)
        events.append(
            session,
            "model.rewound",
            model=model.name,
            data_version=number,
            from_step=abandoned[-1].step,
            to_step=head.step if head else 0,
        )


def _end_updates(session: Session, model: Model, number: int) -> None:
    """Cancel unfinished updates that read the data version, and start those to later data again without it."""
    for update in updates.of_model(session, model.id):
        if update.state in FINISHED_UPDATES:
            continue
        target = datasets.version_by_id(session, update.data_version_id)
        pending_later = update.state == UpdateState.PENDING and target.number > number
        if target.number < number or pending_later:
            continue
        if updates.move(session, update, UpdateState.CANCELLED):
            updates.cancel_open_stages(session, update.id)
            if target.number > number and not update.one_off:
                updates.add(session, model, target)


def _affected(session: Session, model: Model, number: int) -> list[AffectedVersion]:
    rows = models.versions(session, model.id)
    read = lines.data_read(session, [row.update_id for row in rows])
    return [
        AffectedVersion(model.name, row.number, ModelVersionState(row.state))
        for row in rows
        if number in read[row.update_id]
    ]
