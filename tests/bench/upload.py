"""How fast a body is ingested, and what memory that takes: ``python -m tests.bench.upload --megabytes 1024``.

Measures the sink alone, fed from memory by the thread that measures. ``ndjson_body`` is what other
measurements feed.
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

    Making them costs little: the text of a document is cut from one long text at a place of its own.
    """
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkqjxz", k=draw.randint(2, 9))) for _ in range(_WORDS)]
    weights = [1 / rank for rank in range(1, _WORDS + 1)]
    text = " ".join(draw.choices(words, weights, k=400_000))
    made, number = 0, 0
    held = bytearray()
    while made < num_bytes:
        start = draw.randrange(len(text) - _TEXT_BYTES)
        document = {
            "text": f"{number}: {text[start : start + _TEXT_BYTES]}\n",
            "id": f"d-{number}",
            "date": "2024-01-31",
            "source": "made up",
        }
        line = json.dumps(document).encode() + b"\n"
        held += line
        made += len(line)
        number += 1
        while len(held) >= chunk_bytes:
            yield bytes(held[:chunk_bytes])
            del held[:chunk_bytes]
    yield bytes(held)


def resident_bytes() -> int:
    """Memory of this process that is resident now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Stopwatch:
    """Adds up wall and processor time; the second is what counts on a machine that is shared."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._wall
        self.cpu += time.process_time() - self._cpu


def measure(num_bytes: int, directory: Path) -> dict[str, float]:
    """Ingest a made-up body.

    The time of making it is taken out. So that the sink's compressing thread cannot use that time, the body
    is made and fed in groups of chunks that are far larger than what that thread has waiting for it.
    """
    before = highest = 0
    feeding, finishing = Stopwatch(), Stopwatch()
    chunks = ndjson_body(num_bytes)
    with Ingest(LocalArtifacts(directory), DataFormat.NDJSON) as ingest:
        while group := list(islice(chunks, _GROUP_CHUNKS)):
            before = before or resident_bytes()  # what is made is not the sink's
            with feeding:
                for chunk in group:
                    ingest.feed(chunk)
            highest = max(highest, resident_bytes())
            group.clear()
        with finishing:
            body = ingest.end()
            ingest.publish_version(earlier=[], given=[], holdout_fraction=0.02)
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
    parser.add_argument("--directory", type=Path, help="where to write; a temporary folder unless told")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print(json.dumps(measure(arguments.megabytes << 20, Path(directory)), indent=1))


if __name__ == "__main__":
    main()
