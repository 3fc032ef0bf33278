"""`pathswitch demo`: three versions of real text, trained, checked and served on this machine, under load.

What it shows at the end is measured: the loss of every version on every slice, what each cost beside other
ways, and who answered the requests that went on all the while.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from api.cli import output, tables
from api.cli.child_service import ChildService, raise_on_sigterm
from api.cli.datasets import upload_progress
from api.cli.errors import CliError
from api.cli.watch import watch
from api.client import Client, DataFormat
from api.schemas.costs import Costs
from api.schemas.models import Forgetting, ModelVersion
from api.schemas.updates import Update
from deploy.demo.corpus import DemoVersion, demo_versions, to_ndjson
from deploy.demo.picture import Branch, draw
from deploy.demo.traffic import LoadGenerator, Tally, complete
from service.core.states import ModelVersionState

NAME = "demo"
# Small batches, for a hundred steps a version, not fifty.
SPEC = {
    "name": NAME,
    "dataset": NAME,
    "architecture": {"preset": "tiny"},
    "training": {"batch_tokens": 1024},
}
PROMPT = "Return the"
COMPLETION_TOKENS = 48
# After the last release, so that the newest version is seen to answer, too.
LAST_REQUESTS_SECONDS = 3.0

_SERVED = (ModelVersionState.RELEASED, ModelVersionState.RETIRED)
_CHUNK_BYTES = 1 << 16


@dataclass
class Figures:
    """All that was measured. Times are in seconds."""

    start_seconds: float = 0.0
    update_seconds: list[float] = field(default_factory=list)  # from the push to the release
    total_seconds: float = 0.0
    updates: list[Update] = field(default_factory=list)
    versions: list[ModelVersion] = field(default_factory=list)
    costs: Costs | None = None
    forgetting: Forgetting | None = None
    tally: Tally = field(default_factory=Tally)
    completion: tuple[int, str] | None = None

    @property
    def num_released(self) -> int:
        return sum(version.state in _SERVED for version in self.versions)


def demo(home: Path | None, *, keep: bool, json_file: Path | None) -> None:
    """Raises CliError unless three versions were released and no request failed."""
    if home is not None and home.exists() and any(home.iterdir()):
        raise CliError(
            f"{home} is not empty", "The demo starts from nothing: give it another --home, or none."
        )
    console = output.console()
    folder = home.absolute() if home is not None else Path(tempfile.mkdtemp(prefix="pathswitch-demo-"))
    figures = Figures()
    raise_on_sigterm()
    begun = time.monotonic()
    try:
        with ChildService(folder, lambda text: console.print(text, markup=False)) as service:
            figures.start_seconds = time.monotonic() - begun
            _run(service, figures, console)
            figures.total_seconds = time.monotonic() - begun
            _show(figures, console)
            if json_file is not None:
                json_file.write_text(json.dumps(_plain(figures), indent=1) + "\n")
            if keep:
                console.print(f"Left running on {folder}, until Ctrl-C.", markup=False)
                service.wait()
        _check(figures)
    except BaseException:
        if not keep:
            console.print(f"The demo's logs are in {folder / 'logs'}.", markup=False)
        raise
    if home is None:
        shutil.rmtree(folder)


def _run(service: ChildService, figures: Figures, console: Console) -> None:
    """Every version pushed, trained and released in turn, with requests from the first release on."""
    traffic = LoadGenerator(service.inference_url, NAME)
    with Client(service.api_url) as client:
        client.create_dataset(NAME, description="Docstrings of the libraries that Pathswitch stands on")
        client.create_model(SPEC)
        try:
            for number, version in enumerate(demo_versions(), start=1):
                _update(client, version, number, figures, console)
                if number == 1:
                    traffic.start()
            time.sleep(LAST_REQUESTS_SECONDS)
        finally:
            figures.tally = traffic.stop()
        figures.versions = list(client.model_versions(NAME))
        figures.costs = client.costs(NAME)
        figures.forgetting = client.forgetting(NAME)
    with httpx.Client(timeout=60, trust_env=False) as http:
        figures.completion = complete(
            http, service.inference_url, NAME, PROMPT, max_tokens=COMPLETION_TOKENS, seed=0
        )


def _update(client: Client, version: DemoVersion, number: int, figures: Figures, console: Console) -> None:
    data = to_ndjson(version)
    _head(console, f"data version {number}: {version.label}, {len(version.documents):,} documents")
    begun = time.monotonic()
    with upload_progress(version.label, len(data)) as progress:
        pushed = client.push_version(
            NAME, _chunks(data), format=DataFormat.NDJSON, label=version.label, progress=progress
        )
    ended = watch(client, pushed.row.updates[0], console)
    figures.update_seconds.append(time.monotonic() - begun)
    figures.updates.append(ended)


def _show(figures: Figures, console: Console) -> None:
    assert figures.costs is not None
    assert figures.forgetting is not None
    _head(console, "what came of it")
    output.print_table(tables.forgetting(figures.forgetting))
    output.print_table(tables.costs(figures.costs))
    console.print(tables.costs_in_words(figures.costs), "", markup=False, sep="\n")
    branches = [
        Branch(version.number, version.branch_point.step, version.final_step) for version in figures.versions
    ]
    for line in draw(branches, min(console.width, 100)):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    _show_tally(figures.tally)
    if figures.completion is not None:
        number, text = figures.completion
        console.print(f"{NAME}@{number}: {PROMPT + text!r}", markup=False)
    times = ", ".join(output.duration(seconds) for seconds in figures.update_seconds)
    console.print(
        f"\nReady after {output.duration(figures.start_seconds)}; from push to release {times}; "
        f"{output.duration(figures.total_seconds)} in all.",
        markup=False,
    )


def _head(console: Console, text: str) -> None:
    if console.is_terminal:
        console.rule(text, align="left")
    else:
        console.print(f"\n{text}", markup=False)


def _show_tally(tally: Tally) -> None:
    rows = [(f"{NAME}@{number}", f"{count:,}") for number, count in sorted(tally.answered.items())]
    rows += [("failed", f"{tally.failed:,}"), ("mixed versions", f"{tally.mixed:,}")]
    output.print_rows(("answered by", ">requests"), rows, title="Requests while it was updated")
    if tally.latencies:
        p50, p99 = (output.duration(tally.latency(quantile)) for quantile in (0.5, 0.99))
        print(f"Half of them took less than {p50}, all but one in a hundred less than {p99}.\n")
    for failure in tally.failures:
        print(f"  {failure}")


def _check(figures: Figures) -> None:
    wrong = []
    if figures.num_released != len(figures.updates):
        states = ", ".join(f"version {one.data_version}: {one.state}" for one in figures.updates)
        wrong.append(("released", f"{figures.num_released} of {len(figures.updates)} versions ({states})"))
    for what, count in (("failed", figures.tally.failed), ("of mixed versions", figures.tally.mixed)):
        if count:
            wrong.append((what, f"{count} of {figures.tally.requests} requests"))
    if wrong:
        raise CliError("the demo did not go as it should", errors=wrong)


def _plain(figures: Figures) -> dict[str, Any]:
    """As JSON, for documents and benchmarks."""
    assert figures.costs is not None
    assert figures.forgetting is not None
    tally = figures.tally
    return {
        "cpus": os.cpu_count(),
        "start_seconds": figures.start_seconds,
        "update_seconds": figures.update_seconds,
        "total_seconds": figures.total_seconds,
        "released": figures.num_released,
        "requests": {
            "answered": {str(number): count for number, count in sorted(tally.answered.items())},
            "streamed": tally.streamed,
            "failed": tally.failed,
            "mixed": tally.mixed,
            "failures": tally.failures,
            "latency_seconds": {f"p{q}": tally.latency(q / 100) for q in (50, 90, 99, 100)},
        },
        "costs": figures.costs.model_dump(mode="json"),
        "forgetting": figures.forgetting.model_dump(mode="json"),
        "versions": [version.model_dump(mode="json") for version in figures.versions],
        "updates": [update.model_dump(mode="json") for update in figures.updates],
        "completion": figures.completion,
    }


def _chunks(data: bytes) -> Iterator[bytes]:
    return (data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES))
