"""The environment, options and fixtures that all tests share."""

import os

# Ray, transformers and OpenMP read these once, when they are imported. PASSIVE, because threads that spin while
# they wait halve the speed of every other process on a small machine.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.database import database, databases, migrated_postgres, migrated_sqlite, sqlite
from tests.support.postgres import postgres_server, postgres_url
from tests.support.ray_cluster import ray_cluster

__all__ = [
    "database",
    "databases",
    "migrated_postgres",
    "migrated_sqlite",
    "postgres_server",
    "postgres_url",
    "ray_cluster",
    "sqlite",
]


# No deadline: a pause of the machine must not fail an example. Otherwise Hypothesis' defaults, in CI too.
settings.register_profile("pathswitch", settings(), deadline=None)
settings.load_profile("pathswitch")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pathswitch")
    group.addoption(
        "--database-faults", type=float, metavar="RATE", help="fail this share of the product's calls"
    )
    group.addoption("--faults-seed", type=int, default=1, metavar="N", help="choose which calls fail")
    group.addoption("--faults-report", type=Path, metavar="FILE", help="write the counts as JSON")


def pytest_configure(config: pytest.Config) -> None:
    rate = config.getoption("--database-faults")
    if not rate:
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--database-faults counts in one process only: add -n 0")
    from tests.support.database_faults import Faults
    from tests.support.fault_mode import FaultMode

    faults = Faults(config.getoption("--faults-seed"), rate)
    config.pluginmanager.register(FaultMode(faults, config.getoption("--faults-report")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers that others imply, and group tests for xdist: by file, and all that need Ray together."""
    for item in items:
        on_postgres = item.get_closest_marker("slow_on_postgres") and item.get_closest_marker("postgres")
        if on_postgres or item.get_closest_marker("guard"):
            item.add_marker("slow")
        group = "ray" if item.get_closest_marker("ray") else item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
