"""What every test shares: a quiet environment and the PostgreSQL fixtures."""

import os

# Before Ray, transformers or an OpenMP runtime is imported: they read these once. PASSIVE, because threads
# that spin while they wait halve the speed of everything beside them on a small machine.
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


# A machine that pauses for a fifth of a second says nothing about an example. The rest as it is, also where CI has its own.
settings.register_profile("pathswitch", settings(), deadline=None)
settings.load_profile("pathswitch")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pathswitch")
    group.addoption(
        "--database-faults", type=float, metavar="RATE", help="fail so many of the product's calls"
    )
    group.addoption("--faults-seed", type=int, default=1, metavar="N", help="which of the calls")
    group.addoption("--faults-report", type=Path, metavar="FILE", help="write what was counted as JSON")


def pytest_configure(config: pytest.Config) -> None:
    rate = config.getoption("--database-faults")
    if not rate:
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--database-faults counts in one process: -n 0")
    from tests.support.database_faults import Faults
    from tests.support.fault_mode import FaultMode

    faults = Faults(config.getoption("--faults-seed"), rate)
    config.pluginmanager.register(FaultMode(faults, config.getoption("--faults-report")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes: whole files to each, for what files share, and Ray in one only."""
    for item in items:
        if item.get_closest_marker("slow_on_postgres") and item.get_closest_marker("postgres"):
            item.add_marker("slow")
        group = "ray" if item.get_closest_marker("ray") else item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
