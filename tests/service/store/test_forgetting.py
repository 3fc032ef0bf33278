"""The forgetting matrix as read from the store: its slices and its versions."""

from sqlalchemy.orm import Session

from service.core.states import UpdateState
from service.store import datasets, forgetting, updates
from service.store.database import Database, now
from service.store.tables import Model, ModelVersion
from tests.support.rows import add_dataset, add_model, add_running_update


def add_version(
    session: Session, model: Model, number: int, data_version: int, one_off: bool = False, **losses: float
) -> None:
    """Add a version of a succeeded update with ``losses`` by slice."""
    update = add_running_update(session, model, datasets.version(session, model.dataset_id, data_version))
    update.one_off = one_off
    session.flush()
    updates.move(session, update, UpdateState.SUCCEEDED)
    session.add(
        ModelVersion(
            model_id=model.id,
            number=number,
            data_version=data_version,
            update_id=update.id,
            branch_point=90,
            final_step=100,
            parameters=1000,
            evaluations=[
                {"slice": name, "loss": loss, "perplexity": None, "bits_per_byte": 1.0}
                for name, loss in losses.items()
            ],
            cost={},
            export_key="export/e",
            created_at=now(session),
        )
    )
    session.flush()


def test_slices_are_sorted_by_data_version_with_unknown_slices_last(database: Database) -> None:
    with database.transaction() as session:
        model = add_model(session, add_dataset(session, versions=3))
        add_version(session, model, 1, 2, gone=1.0, v2=3.0, v1=4.0)
        found = forgetting.of_model(session, model)
    # The third data version has no column, because no version was evaluated on it.
    assert found.slices == ("v1", "v2", "gone")
    assert found.loss == ((4.0, 3.0, 1.0),)
    assert found.perplexity == ((None, None, None),)
    assert found.bits_per_byte == ((1.0, 1.0, 1.0),)


def test_an_unknown_slice_does_not_enter_backward_transfer(database: Database) -> None:
    with database.transaction() as session:
        model = add_model(session, add_dataset(session, versions=2))
        add_version(session, model, 1, 1, v1=4.0, gone=1.0)
        add_version(session, model, 2, 2, v1=4.5, v2=3.0, gone=9.0)
        assert forgetting.of_model(session, model).backward_transfers == (None, 0.5)


def test_a_one_off_version_is_no_reference_for_backward_transfer(database: Database) -> None:
    with database.transaction() as session:
        model = add_model(session, add_dataset(session, versions=2))
        add_version(session, model, 1, 1, one_off=True, v1=9.0)
        add_version(session, model, 2, 1, v1=4.0)
        add_version(session, model, 3, 2, v1=4.5, v2=3.0)
        assert forgetting.of_model(session, model).backward_transfers == (None, None, 0.5)
