"""Speed and memory of an upload over HTTP: ``python -m tests.bench.upload_http --megabytes 1024``.

The body is generated first and sent from a file, so that generating it does not slow the server. Reports the
server's CPU time besides the wall-clock time, which includes other work on the machine.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from api.client import Client, DataFormat
from service.settings import Settings
from service.store.migrate import upgrade
from tests.bench.upload import ndjson_body
from tests.support.server_process import MemoryWatch, cpu_seconds, server_process


def measure(num_bytes: int, directory: Path) -> dict[str, float]:
    path = directory / "body.ndjson"
    with path.open("wb") as file:
        for chunk in ndjson_body(num_bytes):
            file.write(chunk)
    settings = Settings(home=directory / "home")
    upgrade(settings.database)
    with server_process(settings) as (url, process), Client(url) as client:
        client.create_dataset("warm-up")
        client.push_version("warm-up", [b'{"text": "a"}\n'], format=DataFormat.NDJSON)
        client.create_dataset("measured")
        cpu = cpu_seconds(process.pid)
        sent = 0.0

        def note(_: int) -> None:
            nonlocal sent
            sent = time.perf_counter()

        with MemoryWatch(process.pid) as memory:
            started = time.perf_counter()
            version, _ = client.push_version("measured", path, progress=note)
            ended = time.perf_counter()
        cpu = cpu_seconds(process.pid) - cpu
    mebibytes = version.bytes / 2**20
    return {
        "mebibytes": mebibytes,
        "documents": version.documents,
        "send_seconds": sent - started,
        "seconds": ended - started,
        "server_cpu_seconds": cpu,
        "mib_per_second": mebibytes / (ended - started),
        "mib_per_cpu_second": mebibytes / cpu,
        "memory_growth_mib": memory.growth / 2**20,
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
