"""Serving without Ray: the same HTTP interface and the same replicas in threads of this process."""

import socket
import threading
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing

import uvicorn
from prometheus_client import Metric

from service.artifacts import Artifacts
from service.core.errors import Unavailable
from service.core.serving import ReplicaReport, ServedTarget
from service.core.stopping import DRAIN_SECONDS
from workers.serving.engine.loader import check_installed, engine_loader
from workers.serving.generation import AnswerItem, Generation, unknown_model
from workers.serving.openai.app import build_app
from workers.serving.openai.directory import ServedModel, served_model
from workers.serving.replica.replica import Replica


class LocalServing:
    """One replica per model line, and an HTTP server on ``host`` and ``port`` (0: any free one).

    ``engine``: options for ``engine_loader``. Raises ValueError if the engine is not installed.
    """

    def __init__(
        self, artifacts: Artifacts, host: str, port: int, *, engine: Mapping[str, int | str] | None = None
    ) -> None:
        self._artifacts = artifacts
        self._engine = engine or {}
        check_installed(self._engine)
        self._directory = _LocalDirectory()
        # Bind here, so that the caller gets the error for a port in use, and a free port is known at once.
        self._socket = socket.create_server((host, port))
        self._url = f"http://{host}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                build_app(self._directory),
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="serving", daemon=True
        )
        self._thread.start()

    def url(self) -> str:
        return self._url

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        """Run one replica per line, whatever its spec says.

        It holds several versions, so ``rolling`` works like ``replace``. No other process sets targets, so a
        lower sequence means that the database was restored, and it is applied.
        """
        if not self._thread.is_alive():
            raise Unavailable("the HTTP server has stopped")
        replicas = self._directory.replicas
        for model in replicas.keys() - {target.model for target in targets}:
            replicas.pop(model).pool.close()
        for target in targets:
            if target.model not in replicas:
                loader = engine_loader(0, self._engine)
                replicas[target.model] = Replica(f"{target.model}-0", self._artifacts.open, loader)
            replicas[target.model].pool.set_target(target)

    def observe(self, models: Collection[str]) -> Mapping[str, Sequence[ReplicaReport]]:
        replicas = self._directory.replicas.copy()
        return {model: [replica.pool.report()] for model, replica in replicas.items() if model in models}

    def close(self) -> None:
        """Accept no more connections, and wait for the requests in flight."""
        self._server.should_exit = True
        self._thread.join()
        for replica in self._directory.replicas.values():
            replica.pool.close()


class _LocalDirectory:
    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}

    async def served(self) -> dict[str, ServedModel]:
        models: dict[str, ServedModel] = {}
        for name, replica in self.replicas.copy().items():
            target, served = replica.pool.target, served_model(replica.pool.report())
            if served is not None:
                models[name] = served
            elif target is not None and target.proven:
                models[name] = ServedModel(None, ())
        return models

    async def metrics(self) -> list[Metric]:
        return [metric for replica in self.replicas.copy().values() for metric in replica.metrics()]

    async def generate(self, request: Generation) -> AsyncGenerator[list[AnswerItem], None]:
        replica = self.replicas.get(request.model)
        if replica is None:
            yield [unknown_model(request.model).rejection]
            return
        async with aclosing(replica.generate(request)) as batches:
            async for batch in batches:
                yield batch
