"""Runs a supervisor with two small parts: ``python -m tests.api.cli.up.supervised <home>``.

``base`` has a child process and an orphan in a session of its own. ``upper`` needs ``base``.
"""

import os
import sys
from pathlib import Path

from api.cli.errors import CliError
from api.cli.up.record import ProcessRecord
from api.cli.up.supervisor import Part, Supervisor

# Starts a child and an orphan, whose parent has ended, and then creates a file to report that it is ready.
BASE = """
import subprocess, sys, time
from pathlib import Path
sleeping = [sys.executable, "-c", "import time; time.sleep(120)"]
orphaning = f"import subprocess; subprocess.Popen({sleeping!r}, start_new_session=True)"
subprocess.Popen(sleeping)
subprocess.run([sys.executable, "-c", orphaning], check=True)
Path(sys.argv[1]).touch()
time.sleep(120)
"""
UPPER = "import sys, time; from pathlib import Path; Path(sys.argv[1]).touch(); time.sleep(120)"
BROKEN = "import sys; sys.exit('there is no such thing')"


def part(home: Path, name: str, code: str, *needs: Part) -> Part:
    ready = home / f"{name}.ready"
    return Part(
        name=name,
        ready=ready.exists,
        describe=lambda: "is up",
        log=home / f"{name}.log",
        command=lambda: [sys.executable, "-c", code, str(ready)],
        environment=lambda: dict(os.environ),
        prepare=lambda: ready.unlink(missing_ok=True),
        needs=needs,
        grace_seconds=5,
    )


def main(home: Path, broken: bool) -> None:
    base = part(home, "base", BROKEN if broken else BASE)
    upper = part(home, "upper", UPPER, base)

    def say(name: str, text: str) -> None:
        print(f"{name}: {text}", flush=True)

    try:
        Supervisor([base, upper], ProcessRecord(home), say, lambda: say("all", "ready")).run()
    except CliError as error:
        print(error.block(), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "broken" in sys.argv)
