"""Ask for a model version to be served: forward to a new one, or back to any earlier one."""

from sqlalchemy.orm import Session

from service.core.errors import Conflict
from service.core.serving_specs import ReplaceSpec, RolloutSpec
from service.core.states import ReleaseState
from service.store import models, releases
from service.store.database import Database
from service.store.tables import Release


def release_version(
    database: Database,
    model_name: str,
    version: int,
    *,
    by: str,
    reason: str | None = None,
    rollout: RolloutSpec | None = None,
) -> Release:
    """Write the request; the orchestrator has it served. Raises NotFound. Asked again while live: the live release.

    ``rollout``: instead of the model's own. What was live before has stood its trial: without one, it takes over as soon as
    it is loaded. Raises Conflict where a rolling line is to try a version, or another one to roll.
    """
    with database.transaction() as session:
        model = models.model(session, model_name, lock=True)
        row = models.version(session, model.id, version)
        live = releases.live(session, model.id)
        if (
            live is not None
            and live.model_version_id == row.id
            and releases.pending(session, model.id) is None
        ):
            return live
        own = models.serving_spec(model).rollout
        if rollout is not None and "rolling" in {own.strategy, rollout.strategy} and own != rollout:
            raise Conflict(
                "whether replicas hold one version or several is the model's own: change its rollout"
            )
        if rollout is None and releases.was_live(session, row.id):
            rollout = ReplaceSpec()
        return releases.request(session, model, row, by=by, reason=reason, rollout=rollout)


def roll_back(
    database: Database,
    model_name: str,
    *,
    by: str,
    reason: str | None = None,
    rollout: RolloutSpec | None = None,
) -> Release:
    """Release what was served before. While a newer version is being rolled out, that is the one that is served now. Raises
    Conflict where there is nothing before.
    """
    with database.reading() as session:
        model = models.model(session, model_name)
        version_id = _before(session, model.id)
        if version_id is None:
            raise Conflict(f"nothing was served before: {model_name!r} cannot be rolled back")
        number = models.version_by_id(session, version_id).number
    return release_version(database, model_name, number, by=by, reason=reason or "rollback", rollout=rollout)


def _before(session: Session, model_id: str) -> str | None:
    """The version that a rollback goes to."""
    pending = releases.pending(session, model_id)
    # As pages in a browser: back to one that is there takes away those after it.
    path: list[str] = []
    for row in releases.history(session, model_id):
        if row.state in (ReleaseState.ENDED, ReleaseState.LIVE):
            version_id = row.model_version_id
            path = [*(path[: path.index(version_id)] if version_id in path else path), version_id]
    # A rollback that is under way goes no further when it is asked for again.
    if path and pending is not None and pending.model_version_id not in path:
        return path[-1]
    return path[-2] if len(path) > 1 else None
