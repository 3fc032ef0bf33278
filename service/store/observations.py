"""What replicas said last of what they answer with."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from service.core.serving import ReplicaReport, Residence
from service.store.database import now
from service.store.tables import Observation


@dataclass(frozen=True)
class SeenVersion:
    """A version that a replica was told to hold, and what it has answered there since it was loaded."""

    number: int
    state: Residence
    error: str | None
    requests: int
    failures: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class SeenReplica:
    """``number``: what it answers with where no version is named; None: it does not answer."""

    replica: str
    number: int | None
    versions: tuple[SeenVersion, ...]


_SEEN = TypeAdapter(list[SeenReplica])


def put(session: Session, model_id: str, reports: Sequence[ReplicaReport]) -> None:
    """Of several orchestrators that observe, the last one is believed. The model's row must be locked."""
    row = session.get(Observation, model_id) or Observation(model_id=model_id)
    row.replicas = _SEEN.dump_python([_seen(report) for report in reports], mode="json")
    row.observed_at = now(session)
    session.add(row)


def times(session: Session) -> dict[str, datetime]:
    """By model id, when it was observed."""
    rows = session.execute(sa.select(Observation.model_id, Observation.observed_at))
    return {row.model_id: row.observed_at for row in rows}


def of_model(session: Session, model_id: str) -> tuple[datetime, list[SeenReplica]] | None:
    row = session.get(Observation, model_id)
    return None if row is None else (row.observed_at, _SEEN.validate_python(row.replicas))


def _seen(report: ReplicaReport) -> SeenReplica:
    versions = [
        SeenVersion(
            held.number,
            held.state,
            held.error,
            held.traffic.requests,
            held.traffic.failures,
            held.traffic.prompt_tokens,
            held.traffic.output_tokens,
        )
        for held in report.versions
    ]
    return SeenReplica(report.replica, report.number, tuple(versions))
