"""The seconds that each part of an update takes, and what releases do to the latency of concurrent requests.

    python -m tests.bench.update [--bytes 300000] [--clients 8]

The benchmark starts its own service with `pathswitch up`. Two data versions become released versions of a
tiny model. Then the two are released in turn under a steady stream of requests, while nothing trains.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import httpx

from api.cli.child_service import Service
from api.client import Client, DataFormat
from api.schemas.updates import Update
from deploy.demo.corpus import DemoVersion, demo_versions, to_ndjson
from deploy.demo.traffic import AnswerError, LoadGenerator, Tally, complete
from service.core.stage_specs import StageKind
from service.core.states import FINISHED_UPDATES, ReleaseState, UpdateState

NAME = "bench"
NUM_VERSIONS = 2
NUM_RELEASES = 3
POLL_SECONDS = 0.1
STEADY_SECONDS = 20.0
BETWEEN_RELEASES_SECONDS = 5.0
PATIENCE_SECONDS = 600.0

Durations = dict[str, float]  # part of the update -> seconds, in order


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=300_000)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Service(Path(folder, "home"), lambda _: None) as service,
        Client(service.api_url) as client,
    ):
        client.create_dataset(NAME)
        client.create_model(
            {
                "name": NAME,
                "dataset": NAME,
                # The benchmark measures time, so the gate must release every version.
                "gate": {"max_new_loss_increase": 10, "max_old_loss_increase": 10},
            }
        )
        columns = [
            timed_update(client, service.inference_url, number, body_of(version, options.bytes))
            for number, version in enumerate(demo_versions()[:NUM_VERSIONS], start=1)
        ]
        show_seconds(columns, options.bytes)
        steady, releasing = releases_under_clients(client, service.inference_url, options.clients)
        show_requests(steady, releasing, options.clients)


def body_of(version: DemoVersion, num_bytes: int) -> bytes:
    """The first whole lines of the version, at most ``num_bytes``."""
    body = to_ndjson(version)[:num_bytes]
    return body[: body.rindex(b"\n") + 1]


def timed_update(client: Client, inference_url: str, number: int, body: bytes) -> Durations:
    """Push a data version, wait for the first answer of its model version, and time each part."""
    ends = {"": time.time()}
    pushed = client.push_version(NAME, [body], format=DataFormat.NDJSON)
    ends["POST: upload, hash, split"] = time.time()
    first_steps: dict[StageKind, float] = {}
    update = client.update(pushed.row.updates[0])
    while update.state not in FINISHED_UPDATES:
        time.sleep(POLL_SECONDS)
        update = client.update(update.id)
        for stage in update.stages:
            if stage.progress is not None:
                first_steps.setdefault(stage.kind, time.time())
    assert update.state == UpdateState.SUCCEEDED, update.error
    ends["tokenizer and packs"] = finished(update, StageKind.TOKENIZER, StageKind.PACK)
    ends["training job: start to first step"] = first_steps[StageKind.TRAIN_TRUNK]
    ends["trunk"] = finished(update, StageKind.TRAIN_TRUNK)
    ends["branch"] = finished(update, StageKind.TRAIN_BRANCH)
    ends["export"] = finished(update, StageKind.EXPORT)
    ends["evaluation"] = finished(update, StageKind.EVALUATE)
    ends["gate"] = finished(update, StageKind.GATE)
    ends["release: swap and record"] = finished(update, StageKind.RELEASE)
    wait_for_answer(inference_url, number)
    ends["first answer"] = time.time()
    return {name: end - start for (_, start), (name, end) in pairwise(ends.items())}


def finished(update: Update, *kinds: StageKind) -> float:
    """The Unix time at which the last stage of these kinds ended."""
    ends = [stage.finished_at for stage in update.stages if stage.kind in kinds and stage.finished_at]
    return max(ends).timestamp()


def wait_for_answer(inference_url: str, number: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    with httpx.Client(timeout=60, trust_env=False) as http:
        while time.monotonic() < deadline:
            try:
                if complete(http, inference_url, NAME, "Return the", max_tokens=1)[0] == number:
                    return
            except (httpx.HTTPError, AnswerError):
                pass
            time.sleep(POLL_SECONDS)
    raise TimeoutError(f"version {number} did not answer within {PATIENCE_SECONDS:.0f} s")


def releases_under_clients(client: Client, inference_url: str, num_clients: int) -> tuple[Tally, Tally]:
    """Send requests for a while without releases, and for another while with them. Returns both tallies."""
    traffic = LoadGenerator(inference_url, NAME, num_threads=num_clients)
    traffic.start()
    time.sleep(STEADY_SECONDS)
    steady = traffic.stop()
    traffic = LoadGenerator(inference_url, NAME, num_threads=num_clients)
    traffic.start()
    try:
        for turn in range(NUM_RELEASES):
            time.sleep(BETWEEN_RELEASES_SECONDS)
            release(client, 1 + turn % NUM_VERSIONS)
        time.sleep(BETWEEN_RELEASES_SECONDS)
    finally:
        releasing = traffic.stop()
    return steady, releasing


def release(client: Client, number: int) -> None:
    requested = client.release(NAME, number)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        [found] = [row for row in client.releases(NAME) if row.id == requested.id]
        if found.state != ReleaseState.PENDING:
            assert found.state == ReleaseState.LIVE, found.error
            return
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"version {number} was not released within {PATIENCE_SECONDS:.0f} s")


def show_seconds(columns: list[Durations], num_bytes: int) -> None:
    heads = "".join(f"{f'version {number}':>12}" for number, _ in enumerate(columns, start=1))
    print(f"{f'seconds, {num_bytes:,} bytes a version, tiny preset':48}{heads}")
    for name in columns[0]:
        print(f"{name:48}" + "".join(f"{column[name]:12.1f}" for column in columns))
    print(f"{'from the POST to the first answer':48}" + "".join(f"{sum(c.values()):12.1f}" for c in columns))


def show_requests(steady: Tally, releasing: Tally, num_clients: int) -> None:
    print(f"\n{num_clients} clients, {NUM_RELEASES} releases")
    for name, tally in (("steady", steady), ("with releases", releasing)):
        p50, p99, worst = (tally.latency(quantile) or float("nan") for quantile in (0.5, 0.99, 1.0))
        print(
            f"{name:14} {tally.requests:5} requests, {tally.failed} failed, {tally.mixed} of mixed versions;"
            f" seconds: p50 {p50:.2f}, p99 {p99:.2f}, worst {worst:.2f};"
            f" answered by version: {dict(sorted(tally.answered.items()))}"
        )
        for failure in tally.failures:
            print(f"  {failure}")
    worst, p99 = releasing.latency(1.0), steady.latency(0.99)
    if worst is not None and p99 is not None:
        print(f"worst latency with releases / steady p99: {worst / p99:.2f}")


if __name__ == "__main__":
    main()
