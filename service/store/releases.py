"""Releases: requests to serve a version and the history of what was served. A model has at most one pending and one live."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.serving_specs import RolloutSpec
from service.core.states import ModelVersionState, ReleaseState
from service.store import events, models
from service.store.database import now
from service.store.paging import page
from service.store.tables import Model, ModelVersion, Release


def request(
    session: Session,
    model: Model,
    version: ModelVersion,
    *,
    by: str,
    reason: str | None,
    rollout: RolloutSpec | None = None,
) -> Release:
    """Write a pending release of ``version``, with the model's own rollout unless one is given.

    It supersedes a release that is still pending.
    """
    at = now(session)
    session.execute(
        sa.update(Release)
        .where(Release.model_id == model.id, Release.state == ReleaseState.PENDING)
        .values(state=ReleaseState.SUPERSEDED)
        .execution_options(synchronize_session="fetch")
    )
    row = Release(
        model_id=model.id,
        model_version_id=version.id,
        by=by,
        reason=reason,
        rollout=(rollout or models.serving_spec(model).rollout).model_dump(mode="json"),
        requested_at=at,
    )
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
    """Count the decisions on what the model serves so far: requests, trials begun, promotions and failures."""
    failed = sa.func.count().filter(Release.state == ReleaseState.FAILED)
    moved = sa.func.count(Release.tried_at) + sa.func.count(Release.promoted_at)
    query = sa.select(sa.func.count() + moved + failed)
    query = query.where(Release.model_id == model_id)
    return session.scalar(query) or 0


def get(session: Session, release_id: str) -> Release:
    row = session.get(Release, release_id)
    assert row is not None
    return row


def history(session: Session, model_id: str) -> Sequence[Release]:
    return session.scalars(sa.select(Release).where(Release.model_id == model_id).order_by(Release.id)).all()


def ended(session: Session, model_id: str, limit: int) -> Sequence[str]:
    """Return the ids of up to ``limit`` + 1 versions that were live before, most recent first, without repetition."""
    last_released = sa.func.max(Release.released_at)
    query = sa.select(Release.model_version_id).where(
        Release.model_id == model_id, Release.state == ReleaseState.ENDED
    )
    # One more than ``limit``: the live version may be among them.
    return session.scalars(
        query.group_by(Release.model_version_id).order_by(last_released.desc()).limit(limit + 1)
    ).all()


def was_live(session: Session, version_id: str) -> bool:
    query = sa.select(sa.func.count()).where(
        Release.model_version_id == version_id, Release.released_at.is_not(None)
    )
    return bool(session.scalar(query))


def page_of_releases(
    session: Session, model_id: str, after: str | None, limit: int
) -> tuple[Sequence[Release], bool]:
    return page(session, sa.select(Release).where(Release.model_id == model_id), Release.id, after, limit)


def promote(session: Session, model: Model, release: Release) -> None:
    """Promote a release: every replica has loaded it, and it has passed its trial if there was one."""
    release.promoted_at = now(session)
    session.flush()
    version = session.get(ModelVersion, release.model_version_id)
    assert version is not None
    events.append(session, "release.promoted", release=release.id, model=model.name, version=version.number)


def go_live(session: Session, model: Model, release: Release) -> None:
    """Make a release live, now that every replica answers with it. The previous one ends, and its version is retired."""
    at = now(session)
    previous = live(session, model.id)
    version = session.get(ModelVersion, release.model_version_id)
    assert version is not None
    if previous is not None:
        previous.state = ReleaseState.ENDED
        previous.retired_at = at
        session.flush()
        if previous.model_version_id != version.id:
            old = session.get(ModelVersion, previous.model_version_id)
            assert old is not None
            old.state = ModelVersionState.RETIRED
            session.flush()
    release.state = ReleaseState.LIVE
    release.released_at = at
    version.state = ModelVersionState.RELEASED
    session.flush()
    events.append(session, "release.live", release=release.id, model=model.name, version=version.number)


def fail(session: Session, model: Model, release: Release, error: str) -> None:
    """Fail a release that could not be loaded or did not pass its trial. The live release stays."""
    release.state = ReleaseState.FAILED
    release.error = error
    session.flush()
    events.append(session, "release.failed", release=release.id, model=model.name, error=error)


def _in_state(session: Session, model_id: str, state: ReleaseState) -> Release | None:
    return session.scalar(sa.select(Release).where(Release.model_id == model_id, Release.state == state))
