"""The command line starts fast, because it imports only what it needs."""

import subprocess
import sys

CODE = """
import sys
import api.cli.main
heavy = {"httpx", "pydantic", "sqlalchemy", "fastapi", "ray", "torch", "numpy"} & set(sys.modules)
print(sorted(heavy))
"""


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
