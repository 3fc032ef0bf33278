"""Reads the evaluations of a model's versions into its forgetting matrix."""

from sqlalchemy.orm import Session

from service.core.forgetting import Forgetting, Measure, MeasuredVersion, forgetting
from service.store import datasets, models, updates
from service.store.tables import Model


def of_model(session: Session, model: Model) -> Forgetting:
    """Columns: the holdouts by data version, then uploaded slices, then slices that were measured but no longer exist."""
    one_off = {row.id for row in updates.of_model(session, model.id) if row.one_off}
    versions = [
        MeasuredVersion(
            number=row.number,
            data_version=row.data_version,
            evaluations={
                item["slice"]: {measure: item[measure] for measure in Measure} for item in row.evaluations
            },
            one_off=row.update_id in one_off,
        )
        for row in models.versions(session, model.id)
    ]
    newest = max((version.data_version for version in versions), default=0)
    known = {ref.name: ref.data_version for ref in datasets.slice_refs(session, model.dataset_id, newest)}
    measured = dict.fromkeys(name for version in versions for name in version.evaluations)
    slices = {name: number for name, number in known.items() if name in measured}
    return forgetting(versions, slices | {name: None for name in measured if name not in known})
