"""`pathswitch demo`: trains, checks and serves three versions of real text on this machine, under load.

At the end it shows measurements: the loss of every version on every slice, the cost of each version compared
with training from scratch, and which versions answered the requests that were sent throughout.
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
# Smaller batches than the default, for about 100 steps per version instead of 50.
SPEC = {
    "name": NAME,
    "dataset": NAME,
    "architecture": {"preset": "tiny"},
    "training": {"batch_tokens": 1024},
}
PROMPT = "Return the"
COMPLETION_TOKENS = 48
# Traffic continues this long after the last release, so that the newest version answers requests too.
LAST_REQUESTS_SECONDS = 3.0

_SERVED = (ModelVersionState.RELEASED, ModelVersionState.RETIRED)
_CHUNK_BYTES = 1 << 16


@dataclass
class Measurements:
    """Everything that the demo measured. Times are in seconds."""

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
    """Run the demo. Raises CliError unless every version was released and no request failed."""
    if home is not None and home.exists() and any(home.iterdir()):
        raise CliError(
            f"{home} is not empty", "The demo needs an empty folder: give another --home, or none."
        )
    console = output.console()
    folder = home.absolute() if home is not None else Path(tempfile.mkdtemp(prefix="pathswitch-demo-"))
    measurements = Measurements()
    raise_on_sigterm()
    begun = time.monotonic()
    try:
        with ChildService(folder, lambda text: console.print(text, markup=False)) as service:
            measurements.start_seconds = time.monotonic() - begun
            _run(service, measurements, console)
            measurements.total_seconds = time.monotonic() - begun
            _print_results(measurements, console)
            if json_file is not None:
                json_file.write_text(json.dumps(_as_json(measurements), indent=1) + "\n")
            if keep:
                console.print(f"Still running in {folder}. Press Ctrl-C to stop.", markup=False)
                service.wait()
        _check_success(measurements)
    except BaseException:
        if not keep:
            console.print(f"The demo's logs are in {folder / 'logs'}.", markup=False)
        raise
    if home is None:
        shutil.rmtree(folder)


def _run(service: ChildService, measurements: Measurements, console: Console) -> None:
    """Push, train and release each version in turn, with traffic from the first release on."""
    traffic = LoadGenerator(service.inference_url, NAME)
    with Client(service.api_url) as client:
        client.create_dataset(NAME, description="Docstrings of the libraries that Pathswitch uses")
        client.create_model(SPEC)
        try:
            for number, version in enumerate(demo_versions(), start=1):
                _update(client, version, number, measurements, console)
                if number == 1:
                    traffic.start()
            time.sleep(LAST_REQUESTS_SECONDS)
        finally:
            measurements.tally = traffic.stop()
        measurements.versions = list(client.model_versions(NAME))
        measurements.costs = client.costs(NAME)
        measurements.forgetting = client.forgetting(NAME)
    with httpx.Client(timeout=60, trust_env=False) as http:
        measurements.completion = complete(
            http, service.inference_url, NAME, PROMPT, max_tokens=COMPLETION_TOKENS, seed=0
        )


def _update(
    client: Client, version: DemoVersion, number: int, measurements: Measurements, console: Console
) -> None:
    data = to_ndjson(version)
    _print_heading(console, f"data version {number}: {version.label}, {len(version.documents):,} documents")
    begun = time.monotonic()
    with upload_progress(version.label, len(data)) as progress:
        pushed = client.push_version(
            NAME, _chunks(data), format=DataFormat.NDJSON, label=version.label, progress=progress
        )
    update = watch(client, pushed.row.updates[0], console)
    measurements.update_seconds.append(time.monotonic() - begun)
    measurements.updates.append(update)


def _print_results(measurements: Measurements, console: Console) -> None:
    assert measurements.costs is not None
    assert measurements.forgetting is not None
    _print_heading(console, "results")
    output.print_table(tables.forgetting(measurements.forgetting))
    output.print_table(tables.costs(measurements.costs))
    console.print(tables.costs_in_words(measurements.costs), "", markup=False, sep="\n")
    branches = [
        Branch(version.number, version.branch_point.step, version.final_step)
        for version in measurements.versions
    ]
    for line in draw(branches, min(console.width, 100)):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    _print_tally(measurements.tally)
    if measurements.completion is not None:
        number, text = measurements.completion
        console.print(f"{NAME}@{number}: {PROMPT + text!r}", markup=False)
    times = ", ".join(output.duration(seconds) for seconds in measurements.update_seconds)
    console.print(
        f"\nThe service was ready after {output.duration(measurements.start_seconds)}. "
        f"From push to release: {times}. Total: {output.duration(measurements.total_seconds)}.",
        markup=False,
    )


def _print_heading(console: Console, text: str) -> None:
    if console.is_terminal:
        console.rule(text, align="left")
    else:
        console.print(f"\n{text}", markup=False)


def _print_tally(tally: Tally) -> None:
    rows = [(f"{NAME}@{number}", f"{count:,}") for number, count in sorted(tally.answered.items())]
    rows += [("failed", f"{tally.failed:,}"), ("several versions in one answer", f"{tally.mixed:,}")]
    output.print_rows(("answered by", ">requests"), rows, title="Requests during the updates")
    if tally.latencies:
        p50, p99 = (output.duration(tally.latency(quantile)) for quantile in (0.5, 0.99))
        print(f"Latency: {p50} at the median, {p99} at the 99th percentile.\n")
    for failure in tally.failures:
        print(f"  {failure}")


def _check_success(measurements: Measurements) -> None:
    errors = []
    if measurements.num_released != len(measurements.updates):
        states = ", ".join(f"version {row.data_version}: {row.state}" for row in measurements.updates)
        errors.append(
            ("released", f"{measurements.num_released} of {len(measurements.updates)} versions ({states})")
        )
    for what, count in (("failed", measurements.tally.failed), ("mixed versions", measurements.tally.mixed)):
        if count:
            errors.append((what, f"{count} of {measurements.tally.requests} requests"))
    if errors:
        raise CliError("the demo failed", errors=errors)


def _as_json(measurements: Measurements) -> dict[str, Any]:
    """The measurements as JSON, for documentation and benchmarks."""
    assert measurements.costs is not None
    assert measurements.forgetting is not None
    tally = measurements.tally
    return {
        "cpus": os.cpu_count(),
        "start_seconds": measurements.start_seconds,
        "update_seconds": measurements.update_seconds,
        "total_seconds": measurements.total_seconds,
        "released": measurements.num_released,
        "requests": {
            "answered": {str(number): count for number, count in sorted(tally.answered.items())},
            "streamed": tally.streamed,
            "failed": tally.failed,
            "mixed": tally.mixed,
            "failures": tally.failures,
            "latency_seconds": {f"p{q}": tally.latency(q / 100) for q in (50, 90, 99, 100)},
        },
        "costs": measurements.costs.model_dump(mode="json"),
        "forgetting": measurements.forgetting.model_dump(mode="json"),
        "versions": [version.model_dump(mode="json") for version in measurements.versions],
        "updates": [update.model_dump(mode="json") for update in measurements.updates],
        "completion": measurements.completion,
    }


def _chunks(data: bytes) -> Iterator[bytes]:
    return (data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES))
