"""What serving does beside its peers, and what it bears: ``make bench-serve``, or a part: ``--only engine``.

Exit status 1 where a target is missed.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.bench import figure
from tests.bench.figure import Figure
from tests.bench.serve_engine import engine_figures
from tests.bench.serve_model import write_served_model

CHECKS = ("engine",)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CHECKS, action="append")
    parser.add_argument(
        "--threads", type=int, action="append", help="of the engine and its peer; 1 and all cores"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "export"
        write_served_model(folder, seed=1)
        for check in arguments.only or CHECKS:
            match check:
                case "engine":
                    for threads in arguments.threads or sorted({1, os.cpu_count() or 1}):
                        figures += _shown(engine_figures(folder, threads))
    if arguments.json:
        figure.write(arguments.json, {"serving": figures})
    sys.exit(any(not one.met for one in figures))


def _shown(figures: list[Figure]) -> list[Figure]:
    for one in figures:
        print(one.line(), flush=True)
    return figures


if __name__ == "__main__":
    main()
