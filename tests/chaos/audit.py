"""Audit: triggers record every write to stages and updates with its writer, and the history is judged at the end.

The connection names the writer, so the audit does not depend on the code whose guards it checks.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from service.core.stage_specs import StageKind
from service.core.states import MOVES, StageState, UpdateState
from service.store.database import Database
from service.store.tables import Model, ModelVersion, Release, Stage, Update
from tests.chaos.databases import accepted
from tests.chaos.world import Record

_COLUMNS = ("state", "epoch", "attempt", "owner", "run_id")
_WRITER = "chaos_writer"

# The holder of one stage of a run may record the start of the next stage, even if another orchestrator holds that one.
# It may write nothing else to it.
_ONLY_STARTED = "OLD.started_at IS DISTINCT FROM NEW.started_at" + "".join(
    f" AND OLD.{name} IS NOT DISTINCT FROM NEW.{name}"
    for name in ("state", "epoch", "attempt", "owner", "run_id", "lease_until", "progress", "result", "error")
)

_TABLES = """
CREATE TABLE chaos_stages (id {serial}, stage_id text, kind text, writer text, only_started boolean, {columns});
CREATE TABLE chaos_updates (id {serial}, update_id text, old_state text, new_state text);
"""
_SQLITE = """
CREATE TRIGGER chaos_stages AFTER UPDATE ON stages BEGIN
  INSERT INTO chaos_stages (stage_id, kind, writer, only_started, {names})
  VALUES (NEW.id, NEW.kind, chaos_writer(), {only_started}, {values});
END;
CREATE TRIGGER chaos_updates AFTER UPDATE OF state ON updates BEGIN
  INSERT INTO chaos_updates (update_id, old_state, new_state) VALUES (NEW.id, OLD.state, NEW.state);
END;
"""
_POSTGRES = """
CREATE FUNCTION chaos_stages() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO chaos_stages (stage_id, kind, writer, only_started, {names})
  VALUES (NEW.id, NEW.kind, current_setting('application_name'), {only_started}, {values});
  RETURN NULL;
END $$;
CREATE FUNCTION chaos_updates() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO chaos_updates (update_id, old_state, new_state) VALUES (NEW.id, OLD.state, NEW.state);
  RETURN NULL;
END $$;
CREATE TRIGGER chaos_stages AFTER UPDATE ON stages FOR EACH ROW EXECUTE FUNCTION chaos_stages();
CREATE TRIGGER chaos_updates AFTER UPDATE OF state ON updates FOR EACH ROW EXECUTE FUNCTION chaos_updates();
"""


def install(database: Database) -> None:
    """Create the triggers. On SQLite every writing connection must then come from a signed database (``sign``)."""
    pairs = [f"{age}_{name}" for age in ("old", "new") for name in _COLUMNS]
    types = {"epoch": "integer", "attempt": "integer"}
    columns = ", ".join(f"{pair} {types.get(pair.partition('_')[2], 'text')}" for pair in pairs)
    names, values = ", ".join(pairs), ", ".join(pair.replace("_", ".", 1).upper() for pair in pairs)
    postgres = database.engine.dialect.name == "postgresql"
    serial = "bigserial PRIMARY KEY" if postgres else "integer PRIMARY KEY AUTOINCREMENT"
    script = _TABLES.format(serial=serial, columns=columns)
    script += (_POSTGRES if postgres else _SQLITE).format(
        names=names, values=values, only_started=_ONLY_STARTED
    )
    with database.engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        if postgres:
            raw.execute(script)
            raw.commit()
        else:
            raw.executescript(script)


def sign(database: Database, writer: str) -> Database:
    """Attribute all writes through ``database`` to ``writer``. Call before its first connection."""

    def on_connect(connection: Any, record: Any) -> None:
        if database.engine.dialect.name == "postgresql":
            connection.execute("SELECT set_config('application_name', %s, false)", (writer,))
            connection.commit()
        else:
            connection.create_function(_WRITER, 0, lambda: writer)

    event.listen(database.engine, "connect", on_connect)
    return database


@dataclass(frozen=True)
class Findings:
    """Violations. ``stale``: writes by an orchestrator that did not hold the stage. The rest: versions and effects."""

    illegal: list[str]
    stale: list[str]
    lost: list[str]
    doubled: list[str]

    def all(self) -> list[str]:
        return self.illegal + self.stale + self.lost + self.doubled


def transitions(database: Database) -> int:
    """The number of state changes of stages and updates."""
    with database.reading() as session:
        query = "SELECT (SELECT count(*) FROM chaos_stages WHERE old_state <> new_state) + (SELECT count(*) FROM chaos_updates)"
        return int(session.scalar(sa.text(query)) or 0)


def takeovers(database: Database) -> int:
    with database.reading() as session:
        query = (
            "SELECT count(*) FROM chaos_stages "
            "WHERE old_state = 'running' AND new_state = 'running' AND new_epoch > old_epoch"
        )
        return int(session.scalar(sa.text(query)) or 0)


def judge(database: Database, record: Record) -> Findings:
    """Judge the history of a finished campaign."""
    illegal: list[str] = []
    stale: list[str] = []
    with database.reading() as session:
        writes = session.execute(sa.text("SELECT * FROM chaos_stages ORDER BY id")).all()
        moves = session.execute(sa.text("SELECT * FROM chaos_updates ORDER BY id")).all()
        for write in writes:
            illegal += _illegal(write)
            stale += _stale(write)
        illegal += [
            f"update {move.update_id}: {move.old_state} -> {move.new_state}"
            for move in moves
            if not _may(UpdateState, move.old_state, move.new_state)
        ]
        lost = list(_lost(session, accepted(database)))
        doubled = list(_doubled(session))
    ended = Counter(write.stage_id for write in writes if write.new_state == "succeeded" != write.old_state)
    doubled += [f"stage {stage} succeeded {count} times" for stage, count in ended.items() if count > 1]
    effects: dict[str, Sequence[object]] = {
        "published": record.published,
        "swapped to": record.swaps,
        "submitted": record.submitted,
    }
    for effect, keys in effects.items():
        doubled += [f"{effect} {key} {count} times" for key, count in Counter(keys).items() if count > 1]
    return Findings(illegal, stale, lost, doubled)


def _may(states: type[StrEnum], old: str, new: str) -> bool:
    return old == new or states(new) in MOVES[states][states(old)]


def _illegal(write: Any) -> Iterator[str]:
    """A claim raises the epoch and the attempt. A takeover raises the epoch and keeps the attempt and the run."""
    text = f"stage {write.stage_id} by {write.writer}: "
    if not _may(StageState, write.old_state, write.new_state):
        yield f"{text}{write.old_state} -> {write.new_state}"
    if write.new_epoch < write.old_epoch:
        yield f"{text}epoch {write.old_epoch} -> {write.new_epoch}"
    if write.new_state != StageState.RUNNING:
        return
    if write.old_state != StageState.RUNNING:
        if (write.new_epoch, write.new_attempt) != (write.old_epoch + 1, write.old_attempt + 1):
            yield f"{text}claimed without a new epoch and attempt"
    elif (write.new_attempt, write.new_run_id) != (write.old_attempt, write.old_run_id):
        yield f"{text}changed its attempt or run while running"
    elif (write.new_owner != write.old_owner) and write.new_epoch != write.old_epoch + 1:
        yield f"{text}taken over without a new epoch"


def _stale(write: Any) -> Iterator[str]:
    """Only its owner writes to a running stage, or an orchestrator that takes it over with the same write."""
    if write.old_state != StageState.RUNNING or write.writer == write.old_owner:
        return
    takeover = write.new_owner == write.writer and write.new_epoch == write.old_epoch + 1
    # Every orchestrator may end a release, because it waits for a row, and every one may cancel a stage.
    allowed_to_all = write.kind == StageKind.RELEASE or write.new_state == StageState.CANCELLED
    if not takeover and not allowed_to_all and not write.only_started:
        yield (
            f"stage {write.stage_id}: {write.writer} wrote {write.old_state} -> {write.new_state} "
            f"while {write.old_owner} held epoch {write.old_epoch}"
        )


def _lost(session: Session, accepted: dict[str, list[int]]) -> Iterator[str]:
    """Every accepted data version must have a model version, and the newest must be the released one."""
    for model in session.scalars(sa.select(Model)):
        versions = session.scalars(sa.select(ModelVersion).where(ModelVersion.model_id == model.id)).all()
        made = {row.data_version for row in versions}
        yield from (f"{model.name}: data version {n}" for n in accepted[model.name] if n not in made)
        live = [row.data_version for row in versions if row.state == "released"]
        if live != [max(accepted[model.name])]:
            yield f"{model.name}: released versions are of data versions {live}"
    for update in session.scalars(sa.select(Update).where(Update.state != UpdateState.SUCCEEDED)):
        yield f"update {update.id} is {update.state}: {update.error}"
    for stage in session.scalars(sa.select(Stage).where(Stage.state != StageState.SUCCEEDED)):
        yield f"stage {stage.id} is {stage.state}"


def _doubled(session: Session) -> Iterator[str]:
    """There must be one model version per data version, numbered without gaps, and one release per model version."""
    for model in session.scalars(sa.select(Model)):
        query = sa.select(ModelVersion).where(ModelVersion.model_id == model.id).order_by(ModelVersion.number)
        versions = session.scalars(query).all()
        for number, count in Counter(row.data_version for row in versions).items():
            if count > 1:
                yield f"{model.name}: {count} model versions of data version {number}"
        if [row.number for row in versions] != list(range(1, len(versions) + 1)):
            yield f"{model.name}: model versions are numbered {[row.number for row in versions]}"
    released: Sequence[str] = session.scalars(sa.select(Release.model_version_id)).all()
    for version, count in Counter(released).items():
        if count > 1:
            yield f"model version {version} has {count} releases"
