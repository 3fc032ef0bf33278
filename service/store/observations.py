"""The latest reports of each model's replicas, as the API shows them."""

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
class ObservedVersion:
    """A version on a replica, with what it has answered there since it was loaded."""

    number: int
    state: Residence
    error: str | None
    requests: int
    failures: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class ObservedReplica:
    """A replica. ``number`` is the version that it serves by default, or None if it serves none."""

    replica: str
    number: int | None
    versions: tuple[ObservedVersion, ...]


_REPLICAS = TypeAdapter(list[ObservedReplica])


def put(session: Session, model_id: str, reports: Sequence[ReplicaReport]) -> None:
    """Store the replicas' reports. The latest observation wins. The caller holds the model's row lock."""
    row = session.get(Observation, model_id) or Observation(model_id=model_id)
    row.replicas = _REPLICAS.dump_python([_observed(report) for report in reports], mode="json")
    row.observed_at = now(session)
    session.add(row)


def times(session: Session) -> dict[str, datetime]:
    """Map each model id to the time of its latest observation."""
    rows = session.execute(sa.select(Observation.model_id, Observation.observed_at))
    return {row.model_id: row.observed_at for row in rows}


def of_model(session: Session, model_id: str) -> tuple[datetime, list[ObservedReplica]] | None:
    row = session.get(Observation, model_id)
    return None if row is None else (row.observed_at, _REPLICAS.validate_python(row.replicas))


def _observed(report: ReplicaReport) -> ObservedReplica:
    versions = [
        ObservedVersion(
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
    return ObservedReplica(report.replica, report.number, tuple(versions))
