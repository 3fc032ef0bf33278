"""The rows that a scenario leaves behind, normalised so that equal outcomes compare equal."""

import json
from typing import Any

import sqlalchemy as sa

from service.store.base import Base
from service.store.database import Database
from service.store.tables import Event, IdempotentRequest, Observation, Release, Stage, Update

# Columns that legitimately differ between runs: ids and times, leases and attempts, waste and live progress.
_VOLATILE = frozenset(
    {"id", "owner", "epoch", "attempt", "max_attempts", "lease_until", "ready_at", "run_id"}
    | {"created_at", "started_at", "finished_at", "requested_at", "released_at", "retired_at"}
    | {"begun_at", "tried_at", "promoted_at"}
    | {"wasted_seconds", "progress"}
)
_IGNORED_TABLES = frozenset({Event.__tablename__, IdempotentRequest.__tablename__, Observation.__tablename__})


def read_rows(database: Database) -> dict[str, list[str]]:
    """Table -> its rows as sorted JSON, with stable names in place of ids; and all events but failed attempts."""
    found: dict[str, list[dict[str, Any]]] = {}
    with database.reading() as session:
        for table in Base.metadata.sorted_tables:
            if table.name not in _IGNORED_TABLES:
                rows = session.execute(sa.select(table)).mappings()
                found[table.name] = [dict(row) for row in rows]
        events = session.execute(sa.select(Event.type, Event.data)).all()
    names = _names(found)
    texts = {name: sorted(_text(_stable(row), names) for row in rows) for name, rows in found.items()}
    texts["events"] = sorted(
        _text({"type": type_} | data, names) for type_, data in events if type_ != "stage.attempt_failed"
    )
    return texts


def differences(expected: dict[str, list[str]], actual: dict[str, list[str]]) -> list[str]:
    found = []
    for table in expected:
        missing = [row for row in expected[table] if row not in actual[table]]
        extra = [row for row in actual[table] if row not in expected[table]]
        found += [f"{table}: missing {row}" for row in missing] + [f"{table}: extra {row}" for row in extra]
        if not missing and not extra and len(expected[table]) != len(actual[table]):
            found.append(f"{table}: {len(actual[table])} rows instead of {len(expected[table])}")
    return found


def _stable(row: dict[str, Any]) -> dict[str, Any]:
    stable = {name: value for name, value in row.items() if name not in _VOLATILE}
    if "cost" in stable:
        stable["cost"] = {name: value for name, value in stable["cost"].items() if name != "wasted_seconds"}
    return stable


def _text(row: dict[str, Any], names: dict[str, str]) -> str:
    return _replace_ids(json.dumps(row, sort_keys=True, default=str), names)


def _names(found: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    names = {row["id"]: f"<model {row['name']}>" for row in found["models"]}
    names |= {row["id"]: f"<dataset {row['name']}>" for row in found["datasets"]}
    for row in found["data_versions"]:
        names[row["id"]] = f"<data {row['dataset_id']} {row['number']}>"
    for row in found[Update.__tablename__]:
        names[row["id"]] = f"<update {row['model_id']} {row['data_version_id']}>"
    for row in found["checkpoints"]:
        names[row["id"]] = f"<checkpoint {row['artifact_key']}>"
    for row in found["model_versions"]:
        names[row["id"]] = f"<version {row['model_id']} {row['number']}>"
    for number, row in enumerate(
        sorted(found[Release.__tablename__], key=lambda row: str(row["requested_at"]))
    ):
        names[row["id"]] = f"<release {number}>"
    for row in found[Stage.__tablename__]:
        names[row["id"]] = f"<stage {row['update_id']} {row['name']}>"
    # Names contain other ids, up to three levels deep.
    for _ in range(3):
        names = {id_: _replace_ids(name, names) for id_, name in names.items()}
    return names


def _replace_ids(text: str, names: dict[str, str]) -> str:
    for id_, name in names.items():
        text = text.replace(id_, name)
    return text
