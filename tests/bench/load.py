"""Load test of the control plane: ``make bench-api``, or ``python -m tests.bench.load --json FILE``.

Servers and clients share this machine's cores. Each check gets a new server process on a new home, and a
PostgreSQL server that syncs every commit, as in production. The exit status is 1 if a target is missed.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from service.artifacts import open_artifacts
from service.settings import Settings
from service.store.database import Database
from service.store.migrate import upgrade
from tests.bench import figure
from tests.bench.figure import Figure
from tests.bench.load_checks import folder, lists, registrations, uploads
from tests.support.postgres import run_server
from tests.support.server_process import server_process

CHECKS = ("registrations", "lists", "uploads")
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on", "shared_buffers": "128MB"}


def measure(settings: Settings, check: str, seconds: float) -> list[Figure]:
    upgrade(settings.database)
    database = Database(settings.database)
    with server_process(settings) as (url, process):
        try:
            match check:
                case "registrations":
                    artifacts = open_artifacts(settings.artifacts)
                    return registrations(url, process.pid, database, artifacts, seconds)
                case "lists":
                    return lists(url, database, seconds)
                case _:
                    return uploads(url, process.pid, database)
        finally:
            database.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each load")
    parser.add_argument("--only", choices=CHECKS, action="append")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), action="append")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    results: dict[str, list[Figure]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind in arguments.database or ("sqlite", "postgresql"):
            server = None
            if kind == "postgresql":
                # In /tmp, because the path of a Unix socket must be short.
                folder_of_server = Path(
                    stack.enter_context(tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp"))
                )
                server = stack.enter_context(run_server(folder_of_server, **DURABLE))
            results[kind] = []
            for check in arguments.only or CHECKS:
                home = folder(directory, f"{kind}-{check}")
                settings = Settings(home=home)
                if server is not None:
                    with server.connect() as connection:
                        connection.execute(f'CREATE DATABASE "{check}"')
                    settings = Settings(home=home, database_url=server.url_of(check))
                figures = measure(settings, check, arguments.seconds)
                results[kind] += figures
                for one in figures:
                    print(f"{kind:<11}{one.line()}", flush=True)
    if arguments.json:
        figure.write(arguments.json, results)
    sys.exit(any(not one.met for figures in results.values() for one in figures))


if __name__ == "__main__":
    main()
