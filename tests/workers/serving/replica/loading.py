"""Waits for a replica to load the versions of its target."""

from service.core.serving import ServedTarget
from tests.support.waiting import until
from workers.serving.replica.model_pool import ModelPool


def load(pool: ModelPool, target: ServedTarget) -> None:
    """Set a target and wait until every version of it is loaded or has failed once."""
    pool.set_target(target)
    wait_until_settled(pool)


def wait_until_settled(pool: ModelPool) -> None:
    until(lambda: is_settled(pool), seconds=30)


def is_settled(pool: ModelPool) -> bool:
    """Whether every version of the pool's target is loaded or has failed once."""
    with pool.changed:
        return not pool.missing()
