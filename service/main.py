"""The orchestrator process: the one place that joins the service and the workers. ``python -m service.main``.

Reads its settings from the environment, connects to Ray (unless the executor is local), and ticks until SIGTERM.
"""

import logging
import os
import signal
import socket
import threading
import uuid
from pathlib import Path

from service.artifacts import Artifacts
from service.core.executor import Executor
from service.core.serving import Serving
from service.orchestrator.loop import Orchestrator
from service.settings import Settings
from service.store.database import Database

logger = logging.getLogger("pathswitch.orchestrator")

READY_FILE_VARIABLE = "PATHSWITCH_READY_FILE"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings()
    database = Database(settings.database)
    artifacts = Artifacts.from_url(settings.artifacts)
    artifacts.check()
    executor, serving = build_workers(settings, artifacts)
    stopping = threading.Event()

    def stop(number: int, frame: object) -> None:
        logger.info("stopping on signal %d", number)
        stopping.set()

    # After ray.init, which puts a handler of its own in place.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    orchestrator = Orchestrator(database, artifacts, executor, serving, owner, settings.lease_seconds)
    ready = os.environ.get(READY_FILE_VARIABLE)
    try:
        tick_until(stopping, orchestrator, settings.tick_seconds, Path(ready) if ready else None)
    finally:
        serving.close()
        executor.close()
        database.close()


def tick_until(
    stopping: threading.Event, orchestrator: Orchestrator, tick_seconds: float, ready: Path | None = None
) -> None:
    """Tick, at once where something moved, until ``stopping``. The file ``ready`` says that serving answers."""
    while not stopping.is_set():
        moved = orchestrator.tick()
        if ready and orchestrator.serving_answers:
            ready.touch()  # whoever started this process waits for it
            ready = None
        if not moved:
            stopping.wait(tick_seconds)


def build_workers(settings: Settings, artifacts: Artifacts) -> tuple[Executor, Serving]:
    """The executor and the serving side that the settings ask for. Imports only what they need."""
    if settings.executor == "local":
        from workers.local_executor import LocalExecutor
        from workers.serving.local_serving import LocalServing

        executor = LocalExecutor(artifacts, settings.local_processes)
        return executor, LocalServing(artifacts, settings.serve_host, settings.serve_port)

    import ray

    from workers.ray_executor import RayExecutor
    from workers.run_board import NAMESPACE
    from workers.serving.ray_serving import RayServing

    context = ray.init(address=settings.ray_address, namespace=NAMESPACE, log_to_driver=False)
    jobs_url = f"http://{context.dashboard_url}"
    serving = RayServing(artifacts.url, settings.serve_host, settings.serve_port)
    return RayExecutor(artifacts, jobs_url), serving


if __name__ == "__main__":
    main()
