"""Shadow traffic: copies of requests that the version on trial answers or scores, unseen by any client."""

import asyncio
import logging
from dataclasses import replace

from workers.serving.generation import Generation, RejectionError
from workers.serving.replica.model_pool import ModelPool
from workers.serving.replica.request_runner import EngineFailed, RequestRunner
from workers.serving.replica.routing import Router

logger = logging.getLogger(__name__)

MAX_SHADOWS = 4  # concurrent copies; requests beyond that are not copied


class ShadowTraffic:
    def __init__(self, pool: ModelPool, router: Router, runner: RequestRunner) -> None:
        self._pool = pool
        self._router = router
        self._runner = runner
        self._tasks: set[asyncio.Task[None]] = set()

    def maybe_copy(self, request: Generation) -> None:
        """Copy the trial's share of requests in the background."""
        trial = self._router.draw_shadow()
        if trial is None or len(self._tasks) >= MAX_SHADOWS:
            return
        # A canary answers its own share of the requests, so its copies are only scored.
        task = asyncio.create_task(self._run(request, answered=not trial.share, scored=trial.scored))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, request: Generation, *, answered: bool, scored: bool) -> None:
        tried = self._router.acquire_trial()
        if tried is None:
            return
        try:
            served = self._router.acquire_served()
            try:
                if answered:
                    async for _ in self._runner.decode(tried, replace(request, stream=False)):
                        pass
                if scored:
                    scores = [await self._runner.score(model, request) for model in (served, tried)]
                    # Count both or neither, because their means are compared.
                    for model, traffic in zip((served, tried), scores, strict=True):
                        self._pool.count(model, traffic)
            finally:
                self._pool.release(served)
        except (RejectionError, EngineFailed) as error:
            logger.info("a shadow request failed: %s", error)
        except Exception:  # e.g. from a chat template
            logger.exception("a shadow request failed")
        finally:
            self._pool.release(tried)
