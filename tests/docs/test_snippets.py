"""The shell and Python blocks of the documentation, run in the order of the pages against one service."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from api.client import Client
from service.core.states import FINISHED_UPDATES
from tests.docs.pages import PAGES, ROOT, Block, blocks
from tests.support.control_plane import ndjson
from tests.support.up import Up, kill_leftovers

BLOCKS = [block for page in PAGES for block in blocks(page) if block.info in ("sh", "python")]
BLOCK_SECONDS = 120
PARAGRAPHS_PER_FILE = 150


@dataclass(frozen=True)
class Reader:
    """Someone who follows the documentation: a folder with data files, and a service to talk to."""

    folder: Path
    urls: dict[str, str]
    environment: dict[str, str]

    def wait_for_updates(self) -> None:
        """Wait until no update is left to run: a page does not rely on how far the page before it has got."""
        deadline = time.monotonic() + BLOCK_SECONDS
        with Client(self.urls["api"]) as client:
            while True:
                states = {update.state for model in client.models() for update in client.updates(model.name)}
                if states <= FINISHED_UPDATES:
                    return
                assert time.monotonic() < deadline, states
                time.sleep(0.1)

    def run(self, block: Block) -> subprocess.CompletedProcess[str]:
        text = block.text
        text = text.replace("http://localhost:8080", self.urls["api"])
        text = text.replace("http://localhost:8000/v1", self.urls["serve"])
        text = text.replace("http://localhost:8000", self.urls["serve"].removesuffix("/v1"))
        command = ["bash", "-euc", text.replace("curl ", "curl -fsS ")]
        if block.info == "python":
            command = [sys.executable, "-c", text]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BLOCK_SECONDS,
            check=False,
        )


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    write_data(folder)
    home = folder / "home"
    settings = {"PATHSWITCH_EXECUTOR": "local", "PYTHONPATH": str(ROOT)}
    up = Up(home, (0, 0), **settings)
    try:
        up.wait_until_ready()
        settings |= {
            "PATHSWITCH_HOME": str(home),
            "PATHSWITCH_API_URL": up.urls["api"],
            "PATH": f"{write_commands(folder)}:{os.environ['PATH']}",
        }
        yield Reader(folder, up.urls, os.environ | settings)
        up.ended_with(signal.SIGTERM)
    finally:
        up.kill()
        kill_leftovers(home)


def write_data(folder: Path) -> None:
    """Paragraphs of Python's own documentation, so that a later version has something to learn."""
    paragraphs = [part for _, text in sorted(topics.items()) for part in text.split("\n\n") if len(part) > 80]
    for number, name in enumerate(("v1", "mirror", "v3")):
        chosen = paragraphs[number * PARAGRAPHS_PER_FILE :][:PARAGRAPHS_PER_FILE]
        (folder / f"{name}.ndjson").write_bytes(ndjson(*chosen))


def write_commands(folder: Path) -> Path:
    """`pathswitch` and `python` as an activated environment has them."""
    commands = folder / "bin"
    commands.mkdir()
    for name, arguments in {"pathswitch": "-m api.cli.main ", "python": ""}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
        (commands / name).chmod(0o755)
    return commands


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_the_block_runs(block: Block, reader: Reader) -> None:
    reader.wait_for_updates()
    ran = reader.run(block)
    assert ran.returncode == 0, ran.stdout
