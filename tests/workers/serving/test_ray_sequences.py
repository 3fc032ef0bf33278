"""Who is right where the database and Serve have counted differently; without any Ray."""

from typing import Any

from service.core.serving import ServedTarget
from tests.workers.serving.serving_line import line
from workers.serving.ray_config import ReplicaOptions, applications
from workers.serving.ray_sequences import PATIENCE_LOOKS, PATIENCE_SECONDS, Sequences

OPTIONS = ReplicaOptions("file:///artifacts")


def told(target: ServedTarget) -> dict[str, Any]:
    """Serve's report where this was declared last."""
    apps = applications([target], OPTIONS)
    return {"applications": {app["name"]: {"status": "RUNNING", "deployed_app_config": app} for app in apps}}


def later(sequences: Sequences, target: ServedTarget, details: dict[str, Any]) -> ServedTarget:
    """What is declared after all patience."""
    for look in range(PATIENCE_LOOKS + 1):
        [latest] = sequences.latest([target], details, now=look * PATIENCE_SECONDS)
    return latest


def test_a_later_decision_is_declared_and_an_earlier_one_is_not() -> None:
    sequences, details = Sequences(), told(line(3, sequence=5))
    older, newer = line(2, sequence=4), line(2, sequence=6)
    assert sequences.latest([older], details, now=0.0) == [line(3, sequence=5)]
    assert sequences.latest([newer], details, now=0.0) == [newer]
    assert sequences.latest([ServedTarget("line", None)], details, now=0.0) == [line(3, sequence=5)]
    assert sequences.latest([older], {"applications": {}}, now=0.0) == [older]


def test_a_database_that_stays_behind_is_right_and_counts_on_from_there() -> None:
    sequences, details = Sequences(), told(line(3, sequence=12))
    assert later(sequences, line(2, sequence=10), details) == line(2, sequence=12)
    assert sequences.offset("line") == 2
    details = told(line(2, sequence=12))
    assert sequences.latest([line(2, sequence=10)], details, now=100.0) == [line(2, sequence=12)]
    assert sequences.latest([line(4, sequence=11)], details, now=100.0) == [line(4, sequence=13)]
    # Another process that does not know of it gives way until it has seen that for itself.
    other = Sequences()
    assert other.latest([line(2, sequence=10)], details, now=0.0) == [line(2, sequence=12)]
    assert later(other, line(2, sequence=10), details) == line(2, sequence=12)
    assert other.offset("line") == 2


def test_patience_takes_both_time_and_looks_and_begins_anew() -> None:
    sequences, ahead = Sequences(), told(line(3, sequence=5))
    older = line(2, sequence=4)
    for _ in range(9):
        assert sequences.latest([older], ahead, now=0.0) == [line(3, sequence=5)]
    assert sequences.latest([line(3, sequence=5)], ahead, now=PATIENCE_SECONDS) == [line(3, sequence=5)]
    assert sequences.latest([older], ahead, now=2 * PATIENCE_SECONDS) == [line(3, sequence=5)]
    assert sequences.offset("line") == 0
