"""Ask for a model version to be served: forward to a new one, or back to any earlier one."""

from service.core.errors import Conflict
from service.core.states import ReleaseState
from service.store import models, releases
from service.store.database import Database
from service.store.tables import Release


def release_version(
    database: Database, model_name: str, version: int, *, by: str, reason: str | None = None
) -> Release:
    """Write the request; the orchestrator has it served. Raises NotFound. Asked again while live: the live release."""
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
        return releases.request(session, model, row, by=by, reason=reason)


def roll_back(database: Database, model_name: str, *, by: str, reason: str | None = None) -> Release:
    """Release what was served before the version that is served now. Raises Conflict where there is nothing before."""
    with database.reading() as session:
        model = models.model(session, model_name)
        live = releases.live(session, model.id)
        ended = [row for row in releases.history(session, model.id) if row.state == ReleaseState.ENDED]
        earlier = [row for row in ended if live is None or row.model_version_id != live.model_version_id]
        if not earlier:
            raise Conflict(f"nothing was served before: {model_name!r} cannot be rolled back")
        number = models.version_by_id(session, earlier[-1].model_version_id).number
    return release_version(database, model_name, number, by=by, reason=reason or "rollback")
