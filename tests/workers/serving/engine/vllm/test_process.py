import os
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

from workers.serving.engine.vllm.process import end_with_parent

ROOT = Path(__file__).parents[5]

PARENT = """
import multiprocessing, sys, time

def child(ready):
    from workers.serving.engine.vllm.process import end_with_parent
    end_with_parent()
    ready.set()
    time.sleep(600)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=child, args=(ready,))
    process.start()
    ready.wait()
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_vllms_process_ends_with_its_parent_even_by_kill_9(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_without_a_parent_process_goes_on() -> None:
    end_with_parent()


def test_vllm_finds_the_plugin_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["pathswitch"].partition(":")
    assert getattr(import_module(module), name) is end_with_parent


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
