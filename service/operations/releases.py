"""Requests that a model version be served: a newer one, or an earlier one to roll back."""

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
    """Write a pending release, which the orchestrator carries out. Returns the live release if it already has this version.

    ``rollout`` replaces the model's own. A version that was live before needs no second trial: unless ``rollout`` is
    set, it takes over as soon as it is loaded. Raises NotFound, or Conflict when ``rollout`` and the model's own
    differ and one of them is rolling.
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
                f"a {own.strategy} model cannot release with rollout {rollout.strategy}: replicas hold one version "
                "with rolling and several otherwise; change the model's serving.rollout first"
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
    """Release the version that was served before; while a rollout is under way, the version still served.

    Raises NotFound, or Conflict if no version was served before.
    """
    with database.reading() as session:
        model = models.model(session, model_name)
        version_id = _rollback_target(session, model.id)
        if version_id is None:
            raise Conflict(f"model {model_name!r} has no earlier released version to roll back to")
        number = models.version_by_id(session, version_id).number
    return release_version(database, model_name, number, by=by, reason=reason or "rollback", rollout=rollout)


def _rollback_target(session: Session, model_id: str) -> str | None:
    """Return the id of the version that a rollback releases."""
    pending = releases.pending(session, model_id)
    # Like the pages of a browser: returning to a version drops those released after it.
    path: list[str] = []
    for row in releases.history(session, model_id):
        if row.state in (ReleaseState.ENDED, ReleaseState.LIVE):
            version_id = row.model_version_id
            path = [*(path[: path.index(version_id)] if version_id in path else path), version_id]
    # Requesting it again while a rollback is in progress does not go further back.
    if path and pending is not None and pending.model_version_id not in path:
        return path[-1]
    return path[-2] if len(path) > 1 else None
