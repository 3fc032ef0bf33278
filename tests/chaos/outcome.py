"""What a story has come to: every row that the world can see, without what rightly differs from one telling to another."""

import json
from typing import Any

import sqlalchemy as sa

from service.store.database import Database
from service.store.tables import Base, Event, IdempotentRequest, Observation, Release, Stage, Update

# Times and ids; who held it, how often, and what it was waiting for; what was told live, and is settled by the points.
_DIFFERS = frozenset(
    {"id", "owner", "epoch", "attempt", "max_attempts", "lease_until", "ready_at", "run_id"}
    | {"created_at", "started_at", "finished_at", "requested_at", "released_at", "retired_at"}
    | {"begun_at", "tried_at", "promoted_at"}
    | {"wasted_seconds", "progress"}
)
_LEFT_OUT = frozenset({Event.__tablename__, IdempotentRequest.__tablename__, Observation.__tablename__})


def outcome(database: Database) -> dict[str, list[str]]:
    """Table -> its rows as sorted JSON, ids as names that any telling would give; and the events but failed attempts."""
    found: dict[str, list[dict[str, Any]]] = {}
    with database.reading() as session:
        for table in Base.metadata.sorted_tables:
            if table.name not in _LEFT_OUT:
                rows = session.execute(sa.select(table)).mappings()
                found[table.name] = [dict(row) for row in rows]
        events = session.execute(sa.select(Event.type, Event.data)).all()
    names = _names(found)
    told = {name: sorted(_told(_seen(row), names) for row in rows) for name, rows in found.items()}
    told["events"] = sorted(
        _told({"type": type_} | data, names) for type_, data in events if type_ != "stage.attempt_failed"
    )
    return told


def differences(expected: dict[str, list[str]], got: dict[str, list[str]]) -> list[str]:
    found = []
    for table in expected:
        missing = [row for row in expected[table] if row not in got[table]]
        more = [row for row in got[table] if row not in expected[table]]
        found += [f"{table}: missing {row}" for row in missing] + [f"{table}: more {row}" for row in more]
        if not missing and not more and len(expected[table]) != len(got[table]):
            found.append(f"{table}: {len(got[table])} rows instead of {len(expected[table])}")
    return found


def _seen(row: dict[str, Any]) -> dict[str, Any]:
    seen = {name: value for name, value in row.items() if name not in _DIFFERS}
    if "cost" in seen:
        seen["cost"] = {name: value for name, value in seen["cost"].items() if name != "wasted_seconds"}
    return seen


def _told(row: dict[str, Any], names: dict[str, str]) -> str:
    text = json.dumps(row, sort_keys=True, default=str)
    for id_, name in names.items():
        text = text.replace(id_, name)
    return text


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
    # Names are made of ids: twice, so that those are named too.
    for _ in range(3):
        names = {id_: _named(name, names) for id_, name in names.items()}
    return names


def _named(text: str, names: dict[str, str]) -> str:
    for id_, name in names.items():
        text = text.replace(id_, name)
    return text
