"""What the versions of a model were measured to be on every slice."""

from sqlalchemy.orm import Session

from service.core.forgetting import Forgetting, Measure, MeasuredVersion, forgetting
from service.store import datasets, models, updates
from service.store.tables import Model


def of_model(session: Session, model: Model) -> Forgetting:
    """Slices in order of data version, given ones last; whatever else was measured on comes after them."""
    one_off = {row.id for row in updates.of_model(session, model.id) if row.one_off}
    versions = [
        MeasuredVersion(
            number=row.number,
            data_version=row.data_version,
            evaluations={item["slice"]: {of: item[of] for of in Measure} for item in row.evaluations},
            one_off=row.update_id in one_off,
        )
        for row in models.versions(session, model.id)
    ]
    newest = max((version.data_version for version in versions), default=0)
    known = {ref.name: ref.data_version for ref in datasets.slice_refs(session, model.dataset_id, newest)}
    measured = dict.fromkeys(name for version in versions for name in version.evaluations)
    slices = {name: number for name, number in known.items() if name in measured}
    return forgetting(versions, slices | {name: None for name in measured if name not in known})
