"""Two small parts under a supervisor, as a process of its own: ``python -m tests.api.cli.up.supervised <home>``.

``base`` has a child, and starts another in a session of its own whose parent ends at once. ``upper`` needs
``base``.
"""

import os
import sys
from pathlib import Path

from api.cli.errors import CliError
from api.cli.up.record import ProcessRecord
from api.cli.up.supervisor import Part, Supervisor

# Tells that it is ready by a file, after it has started a child, and one that loses its parent.
BASE = """
import subprocess, sys, time
from pathlib import Path
sleeping = [sys.executable, "-c", "import time; time.sleep(120)"]
losing = f"import subprocess; subprocess.Popen({sleeping!r}, start_new_session=True)"
subprocess.Popen(sleeping)
subprocess.run([sys.executable, "-c", losing], check=True)
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
    except CliError as problem:
        print(problem.block(), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "broken" in sys.argv)
