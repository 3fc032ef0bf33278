"""Releases: what is asked to be served and what was, at most one pending and one live per model."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.states import ModelVersionState, ReleaseState
from service.store import events
from service.store.database import now
from service.store.paging import page
from service.store.tables import Model, ModelVersion, Release


def request(session: Session, model: Model, version: ModelVersion, *, by: str, reason: str | None) -> Release:
    """Ask for ``version`` to be served. A request that was still pending is superseded: the last one wins."""
    at = now(session)
    session.execute(
        sa.update(Release)
        .where(Release.model_id == model.id, Release.state == ReleaseState.PENDING)
        .values(state=ReleaseState.SUPERSEDED)
        .execution_options(synchronize_session="fetch")
    )
    row = Release(model_id=model.id, model_version_id=version.id, by=by, reason=reason, requested_at=at)
    session.add(row)
    session.flush()
    events.append(
        session, "release.requested", release=row.id, model=model.name, version=version.number, by=by
    )
    return row


def pending(session: Session, model_id: str) -> Release | None:
    return _in_state(session, model_id, ReleaseState.PENDING)


def live(session: Session, model_id: str) -> Release | None:
    return _in_state(session, model_id, ReleaseState.LIVE)


def decisions(session: Session, model_id: str) -> int:
    """How often it was decided what the model should answer with: by a request, and by one that failed."""
    failed = sa.func.count().filter(Release.state == ReleaseState.FAILED)
    query = sa.select(sa.func.count() + failed).where(Release.model_id == model_id)
    return session.scalar(query) or 0


def get(session: Session, release_id: str) -> Release:
    row = session.get(Release, release_id)
    assert row is not None
    return row


def history(session: Session, model_id: str) -> Sequence[Release]:
    return session.scalars(sa.select(Release).where(Release.model_id == model_id).order_by(Release.id)).all()


def page_of_releases(
    session: Session, model_id: str, after: str | None, limit: int
) -> tuple[Sequence[Release], bool]:
    return page(session, sa.select(Release).where(Release.model_id == model_id), Release.id, after, limit)


def go_live(session: Session, model: Model, release: Release) -> None:
    """Every replica answers with it: end what was live before, and move the versions' states along."""
    at = now(session)
    before = live(session, model.id)
    version = session.get(ModelVersion, release.model_version_id)
    assert version is not None
    if before is not None:
        before.state = ReleaseState.ENDED
        before.retired_at = at
        session.flush()
        if before.model_version_id != version.id:
            old = session.get(ModelVersion, before.model_version_id)
            assert old is not None
            old.state = ModelVersionState.RETIRED
            session.flush()
    release.state = ReleaseState.LIVE
    release.released_at = at
    version.state = ModelVersionState.RELEASED
    session.flush()
    events.append(session, "release.live", release=release.id, model=model.name, version=version.number)


def fail(session: Session, model: Model, release: Release, error: str) -> None:
    """The replicas could not load it. What was live stays live."""
    release.state = ReleaseState.FAILED
    release.error = error
    session.flush()
    events.append(session, "release.failed", release=release.id, model=model.name, error=error)


def _in_state(session: Session, model_id: str, state: ReleaseState) -> Release | None:
    return session.scalar(sa.select(Release).where(Release.model_id == model_id, Release.state == state))
