"""``make bench-serve``: compares serving with its peers, and tests it under releases, kills and load.

``--only engine`` runs one part. All parts but the engine start a Ray cluster. Exits with status 1 if a target is missed.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from tests.bench import figure, serve_http
from tests.bench.figure import Figure
from tests.bench.serve_engine import engine_figures
from tests.bench.serve_model import LARGE, write_served_model
from tests.bench.serve_world import serving_world
from workers.serving.engine.memory import this_device

CHECKS = ("engine", "overhead", "releases", "kills", "overload", "soak")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CHECKS, action="append")
    parser.add_argument(
        "--threads",
        type=int,
        action="append",
        help="threads of the engine and its peer (repeatable; default: 1 and all cores)",
    )
    parser.add_argument("--releases", type=int, default=serve_http.RELEASES)
    parser.add_argument("--minutes", type=float, default=20.0, help="duration of the soak test")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    checks = arguments.only or CHECKS
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "export"
        write_served_model(folder, seed=1)
        if "engine" in checks:
            if this_device().type == "cuda":
                large = Path(directory) / "large"
                write_served_model(large, seed=1, shape=LARGE, dtype=torch.bfloat16)
                figures += _printed(engine_figures(folder, 0, "engine, GPU, 10 M in float32"))
                figures += _printed(engine_figures(large, 0, "engine, GPU, 107 M in bfloat16"))
            else:
                for threads in arguments.threads or sorted({1, os.cpu_count() or 1}):
                    name = f"engine, {threads} threads" if threads > 1 else "engine, 1 thread"
                    figures += _printed(engine_figures(folder, threads, name))
        if set(checks) - {"engine"}:
            with serving_world(Path(directory)) as world:
                for check in checks:
                    match check:
                        case "overhead":
                            figures += _printed(serve_http.overhead_figures(world, folder))
                        case "releases":
                            figures += _printed(serve_http.release_figures(world, arguments.releases))
                        case "kills":
                            figures += _printed(serve_http.kill_figures(world))
                        case "overload":
                            figures += _printed(serve_http.overload_figures(world))
                        case "soak":
                            figures += _printed(serve_http.soak_figures(world, arguments.minutes))
    if arguments.json:
        figure.write(arguments.json, {"serving": figures})
    sys.exit(any(not row.met for row in figures))


def _printed(figures: list[Figure]) -> list[Figure]:
    for row in figures:
        print(row.line(), flush=True)
    return figures


if __name__ == "__main__":
    main()
