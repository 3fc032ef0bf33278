"""Memory stays flat: it does not grow with the body."""

from pathlib import Path

from service.artifacts import LocalArtifacts
from service.ingest.reading import read_documents, training_documents
from tests.bench.upload import measure, ndjson_body, resident_bytes
from tests.service.ingest.support import folder, publish

MIB = 1 << 20


def test_ingesting_takes_little_more_memory_for_a_larger_body(tmp_path: Path) -> None:
    measure(4 * MIB, tmp_path / "warm")  # loads libraries and warms allocators
    measured = measure(64 * MIB, tmp_path / "measured")
    assert measured["mebibytes"] >= 64
    assert measured["memory_growth_mib"] < 32


def test_reading_takes_little_memory(tmp_path: Path) -> None:
    artifacts = LocalArtifacts(tmp_path)
    version = folder(artifacts, publish(artifacts, ndjson_body(24 * MIB), fraction=0.02))
    next(iter(read_documents(version)))
    before = highest = resident_bytes()
    trained = 0
    for number, _ in enumerate(training_documents(version, [], [])):
        trained += 1
        if number % 1000 == 0:
            highest = max(highest, resident_bytes())
    assert trained > 10_000
    assert highest - before < 12 * MIB
