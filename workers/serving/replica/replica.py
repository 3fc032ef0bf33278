"""One replica of one model line: its loaded versions, and the requests that they answer."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

from prometheus_client import Metric

from workers.serving.engine.port import EngineLoader
from workers.serving.generation import AnswerItem, Generation, RejectionError, failed
from workers.serving.replica.loading import LoadingThread
from workers.serving.replica.metrics import replica_metrics
from workers.serving.replica.model_pool import RETRY_SECONDS, ModelPool
from workers.serving.replica.request_runner import EngineFailed, RequestRunner
from workers.serving.replica.routing import Router
from workers.serving.replica.shadow import ShadowTraffic

logger = logging.getLogger(__name__)


class Replica:
    """Answers requests for one model line. Set its targets and read its reports on ``pool``.

    ``open_export`` verifies the artifact with that key and returns its folder.
    """

    def __init__(
        self,
        name: str,
        open_export: Callable[[str], Path],
        engine_loader: EngineLoader,
        *,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.pool = ModelPool(name, retry_seconds=retry_seconds)
        self._loading = LoadingThread(self.pool, open_export, engine_loader)
        self._router = Router(self.pool)
        self._runner = RequestRunner(self.pool)
        self._shadow = ShadowTraffic(self.pool, self._router, self._runner)

    def healthy(self) -> bool:
        """Whether the replica answers, or can still load the version that should; if not, replace its process."""
        return self._loading.is_alive() and self.pool.can_recover()

    def metrics(self) -> list[Metric]:
        target = self.pool.target
        model = "" if target is None else target.model
        return replica_metrics(model, self.pool.report(), self.pool.all_models())

    async def generate(self, request: Generation) -> AsyncGenerator[list[AnswerItem], None]:
        """Answer a request with a single version: in batches if it streams, otherwise in one batch.

        If the version on trial fails, or an engine dies, before the first batch, the served version answers
        instead, once it is loaded.
        """
        try:
            model = await self._router.route(request.version, request.affinity)
            for is_last_attempt in (False, True):
                started = False
                may_retry = not is_last_attempt and request.version is None
                try:
                    if request.version is None and not self._router.is_on_trial(model):
                        self._shadow.maybe_copy(request)
                    async with aclosing(self._runner.run(model, request)) as batches:
                        async for batch in batches:
                            started = True
                            yield batch
                    return
                except RejectionError as error:
                    # The version on trial may be busy, or have a shorter context than the served one.
                    if not (may_retry and self._router.is_on_trial(model)):
                        raise
                    logger.info("version %d rejected a request: %s", model.version.number, error)
                except EngineFailed as error:
                    on_trial = self._router.is_on_trial(model)
                    lost = self.pool.discard_if_unhealthy(model)
                    if started or not may_retry or not (on_trial or lost):
                        raise failed(str(error)) from error
                    logger.warning("version %d failed a request: %s", model.version.number, error)
                finally:
                    self.pool.release(model)
                model = await self._router.route_to_served()
        except RejectionError as error:
            yield [error.rejection]
