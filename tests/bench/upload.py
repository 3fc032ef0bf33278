"""Speed and memory of the ingestion sink: ``python -m tests.bench.upload --megabytes 1024``.

Measures the sink alone, fed from memory. Other benchmarks and tests also use ``ndjson_body``.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from service.artifacts import LocalArtifacts
from service.ingest.formats import DataFormat
from service.ingest.ingest import Ingest

_WORDS = 4096
_TEXT_BYTES = 2000
_GROUP_CHUNKS = 1024  # 64 MiB


def ndjson_body(num_bytes: int, chunk_bytes: int = 1 << 16, seed: int = 0) -> Iterator[bytes]:
    """Chunks of about ``num_bytes`` of ndjson: distinct documents of about 2 KB that compress like text.

    They are cheap to make: each is cut from one long text at a random position.
    """
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkqjxz", k=draw.randint(2, 9))) for _ in range(_WORDS)]
    weights = [1 / rank for rank in range(1, _WORDS + 1)]
    text = " ".join(draw.choices(words, weights, k=400_000))
    num_bytes_made, number = 0, 0
    buffer = bytearray()
    while num_bytes_made < num_bytes:
        start = draw.randrange(len(text) - _TEXT_BYTES)
        document = {
            "text": f"{number}: {text[start : start + _TEXT_BYTES]}\n",
            "id": f"d-{number}",
            "date": "2024-01-31",
            "source": "made up",
        }
        line = json.dumps(document).encode() + b"\n"
        buffer += line
        num_bytes_made += len(line)
        number += 1
        while len(buffer) >= chunk_bytes:
            yield bytes(buffer[:chunk_bytes])
            del buffer[:chunk_bytes]
    yield bytes(buffer)


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Stopwatch:
    """Adds up wall-clock and CPU time. On a shared machine, CPU time is the meaningful one."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._wall
        self.cpu += time.process_time() - self._cpu


def measure(num_bytes: int, directory: Path) -> dict[str, float]:
    """Ingest a generated body. The time to generate it does not count.

    The body is generated and fed in groups of chunks that are far larger than the queue of the sink's
    compressing thread, so that this thread cannot catch up while a group is generated.
    """
    before = highest = 0
    feeding, finishing = Stopwatch(), Stopwatch()
    chunks = ndjson_body(num_bytes)
    with Ingest(LocalArtifacts(directory), DataFormat.NDJSON) as ingest:
        while group := list(islice(chunks, _GROUP_CHUNKS)):
            # After generating the first group, whose memory is not the sink's.
            before = before or resident_bytes()
            with feeding:
                for chunk in group:
                    ingest.feed(chunk)
            highest = max(highest, resident_bytes())
            group.clear()
        with finishing:
            body = ingest.end()
            ingest.publish_version(earlier=[], uploaded=[], holdout_fraction=0.02)
        highest = max(highest, resident_bytes())
    mebibytes = body.bytes / 2**20
    return {
        "mebibytes": mebibytes,
        "documents": body.documents,
        "feed_seconds": feeding.wall,
        "feed_cpu_seconds": feeding.cpu,
        "finish_seconds": finishing.wall,
        "finish_cpu_seconds": finishing.cpu,
        "mib_per_second": mebibytes / (feeding.wall + finishing.wall),
        "mib_per_cpu_second": mebibytes / (feeding.cpu + finishing.cpu),
        "memory_growth_mib": (highest - before) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print(json.dumps(measure(arguments.megabytes << 20, Path(directory)), indent=1))


if __name__ == "__main__":
    main()
