"""Stops orchestrators for longer than their leases, and kills them, while others work."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import traffic
from tests.chaos.databases import Databases
from tests.chaos.processes import Fleet
from tests.chaos.report import Report
from tests.chaos.traffic import Traffic
from tests.chaos.world import worlds

ORCHESTRATORS = 6
LEASE_SECONDS = 1.0
STOPPED_SECONDS = (1.5, 3.0)
SECONDS_BETWEEN = (0.3, 1.0)
MIN_RUNNING = 3  # so that a running orchestrator can always take over


def run(
    databases: Databases, folder: Path, *, updates: int = 60, stops: int = 30, kills: int = 30, seed: int = 0
) -> Report:
    """Send ``stops`` SIGSTOPs and ``kills`` SIGKILLs while ``updates`` updates run."""
    lines = min(6, updates)
    work = Traffic(
        lines=lines,
        versions=-(-updates // lines),
        orchestrators=ORCHESTRATORS,
        lease_seconds=LEASE_SECONDS,
        seconds_between=(stops + kills) * sum(SECONDS_BETWEEN) / 2 / -(-updates // lines),
    )
    next_signal = time.monotonic()

    def disturb(fleet: Fleet, rng: random.Random, holding: Sequence[str]) -> None:
        nonlocal next_signal
        running = fleet.owners()
        if time.monotonic() < next_signal or len(running) <= MIN_RUNNING:
            return
        owner = rng.choice([owner for owner in running if owner in holding] or running)
        if fleet.stops < stops and (fleet.kills >= kills or rng.random() < 0.5):
            fleet.stop(owner, rng.uniform(*STOPPED_SECONDS))
        else:
            fleet.kill(owner)
        next_signal = time.monotonic() + rng.uniform(*SECONDS_BETWEEN)

    def enough(fleet: Fleet) -> bool:
        return fleet.stops >= stops and fleet.kills >= kills

    began = time.monotonic()
    root = folder / f"artifacts-{time.monotonic_ns()}"
    with worlds() as manager, databases.fresh() as url:
        world = manager.world(str(root), traffic.STAGE_SECONDS)
        result = traffic.run(url, root, world, work, disturb, enough, seed)
    report = traffic.report_of(
        f"SIGSTOP and SIGKILL among {ORCHESTRATORS} orchestrators, {databases.kind}",
        result,
        time.monotonic() - began,
    )
    report.figures = {
        "SIGSTOP for longer than the lease": result.fleet.stops,
        "SIGKILL": result.fleet.kills,
    } | report.figures
    return report
