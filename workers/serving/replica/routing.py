"""Which loaded version answers a request."""

import asyncio
import hashlib
import random
import time

from service.core.serving import ServedVersion, Trial
from workers.serving.generation import RejectionError, not_ready, unknown_version
from workers.serving.replica.model_pool import LoadedModel, ModelPool

RECOVERY_SECONDS = 30.0  # how long requests wait while a lost served engine is replaced


class Router:
    """Acquires models from the pool for requests. Callers release every model on the pool."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool

    async def route(self, number: int | None = None, affinity: str | None = None) -> LoadedModel:
        """Like ``acquire``, but wait while a lost served version is reloaded. Raises RejectionError."""
        try:
            return self.acquire(number, affinity)
        except RejectionError:
            if number is not None or self._pool.recovering() is None:
                raise
        # Without another draw: repeated draws would move all waiting requests to the version on trial.
        return await self.route_to_served()

    async def route_to_served(self) -> LoadedModel:
        """Acquire the served version; wait while its lost engine is replaced. Raises RejectionError."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                return self.acquire_served()
            except RejectionError:
                if self._pool.recovering() is None or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.05)

    def acquire(self, number: int | None = None, affinity: str | None = None) -> LoadedModel:
        """Acquire the version with that number; without one, the served version or, for its share, the one on trial.

        Equal affinities get the same version. Raises RejectionError.
        """
        with self._pool.changed:
            if number is not None:
                return _acquired(self._numbered(number))
            trial = self.trial()
            if trial is not None and trial.share > _draw(trial.version, affinity):
                return _acquired(self._pool.models[trial.version])
            return _acquired(self._served())

    def acquire_served(self) -> LoadedModel:
        """Raises RejectionError."""
        with self._pool.changed:
            return _acquired(self._served())

    def acquire_trial(self) -> LoadedModel | None:
        """Acquire the version on trial if it is loaded."""
        with self._pool.changed:
            trial = self.trial()
            return None if trial is None else _acquired(self._pool.models[trial.version])

    def is_on_trial(self, model: LoadedModel) -> bool:
        target = self._pool.target
        return target is not None and target.trial is not None and target.trial.version == model.version

    def draw_shadow(self) -> Trial | None:
        """Return the trial if this request should be copied to the version on trial."""
        trial = None if self._pool.target is None else self._pool.target.trial
        return None if trial is None or random.random() >= trial.shadowed else trial

    def trial(self) -> Trial | None:
        """Return the trial if its version is loaded."""
        target = self._pool.target
        if target is None or target.trial is None or target.trial.version not in self._pool.models:
            return None
        return target.trial

    def _served(self) -> LoadedModel:
        pool = self._pool
        if pool.served is not None:
            return pool.served
        if pool.target is None or pool.target.stable is None:
            raise not_ready("No version of this model has been released yet")
        stable = pool.target.stable
        state = "could not be loaded" if stable in pool.failures else "is being loaded"
        raise not_ready(f"Version {stable.number} of the model `{pool.target.model}` {state}")

    def _numbered(self, number: int) -> LoadedModel:
        pool = self._pool
        for version, model in pool.models.items():
            if version.number == number:
                return model
        name = "" if pool.target is None else pool.target.model
        if any(version.number == number for version in pool.missing()):
            raise not_ready(f"Version {number} of the model `{name}` is being loaded")
        raise unknown_version(name, number, sorted(version.number for version in pool.models))


def _acquired(model: LoadedModel) -> LoadedModel:
    model.in_flight += 1
    return model


def _draw(version: ServedVersion, affinity: str | None) -> float:
    """Draw from [0, 1). Every replica draws the same number for the same version and affinity."""
    if affinity is None:
        return random.random()
    digest = hashlib.blake2b(
        f"{version.number}:{affinity}".encode(errors="surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest) / (1 << 64)
