"""Which target is newer when the database and Serve have different sequence numbers; without any Ray."""

from typing import Any

from service.core.serving import ServedTarget
from tests.workers.serving.serving_line import line
from workers.serving.ray.declaration import ReplicaOptions, applications
from workers.serving.ray.sequences import PATIENCE_POLLS, PATIENCE_SECONDS, Sequences

OPTIONS = ReplicaOptions("file:///artifacts")


def serve_details(target: ServedTarget) -> dict[str, Any]:
    """Return what Serve reports after this target was declared."""
    apps = applications([target], OPTIONS)
    return {"applications": {app["name"]: {"status": "RUNNING", "deployed_app_config": app} for app in apps}}


def latest_in_the_end(sequences: Sequences, target: ServedTarget, details: dict[str, Any]) -> ServedTarget:
    """Return the target that is declared once Serve has stayed ahead for long enough."""
    for poll in range(PATIENCE_POLLS):
        sequences.latest([target], details, now=poll * PATIENCE_SECONDS)
    [latest] = sequences.latest([target], details, now=PATIENCE_POLLS * PATIENCE_SECONDS)
    return latest


def test_a_later_decision_is_declared_and_an_earlier_one_is_not() -> None:
    sequences, details = Sequences(), serve_details(line(3, sequence=5))
    older, newer = line(2, sequence=4), line(2, sequence=6)
    assert sequences.latest([older], details, now=0.0) == [line(3, sequence=5)]
    assert sequences.latest([newer], details, now=0.0) == [newer]
    assert sequences.latest([ServedTarget("line", None)], details, now=0.0) == [line(3, sequence=5)]
    assert sequences.latest([older], {"applications": {}}, now=0.0) == [older]


def test_a_database_that_stays_behind_wins_and_continues_from_the_sequence_of_serve() -> None:
    sequences, details = Sequences(), serve_details(line(3, sequence=12))
    assert latest_in_the_end(sequences, line(2, sequence=10), details) == line(2, sequence=12)
    assert sequences.offset("line") == 2
    details = serve_details(line(2, sequence=12))
    assert sequences.latest([line(2, sequence=10)], details, now=100.0) == [line(2, sequence=12)]
    assert sequences.latest([line(4, sequence=11)], details, now=100.0) == [line(4, sequence=13)]
    # Another process does not know the offset, and yields to Serve until it has observed the same.
    other = Sequences()
    assert other.latest([line(2, sequence=10)], details, now=0.0) == [line(2, sequence=12)]
    assert latest_in_the_end(other, line(2, sequence=10), details) == line(2, sequence=12)
    assert other.offset("line") == 2


def test_patience_requires_both_time_and_polls_and_starts_over() -> None:
    sequences, ahead = Sequences(), serve_details(line(3, sequence=5))
    older = line(2, sequence=4)
    for _ in range(9):
        assert sequences.latest([older], ahead, now=0.0) == [line(3, sequence=5)]
    assert sequences.latest([line(3, sequence=5)], ahead, now=PATIENCE_SECONDS) == [line(3, sequence=5)]
    assert sequences.latest([older], ahead, now=2 * PATIENCE_SECONDS) == [line(3, sequence=5)]
    assert sequences.offset("line") == 0
