"""The orchestrator process, and the one place that joins service and workers. Run it with ``python -m service.main``.

It reads its settings from the environment, connects to Ray unless the executor is local, and ticks until SIGTERM. Then it
finishes what runs in this process, or in a Ray cluster that ends with it. On a Ray cluster that stays, training and
serving continue, and the next orchestrator adopts them.
"""

import logging
import os
import signal
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.artifacts import Artifacts, open_artifacts
from service.core.executor import Executor
from service.core.serving import Serving
from service.core.stopping import set_exit_deadline
from service.orchestrator.loop import Orchestrator
from service.settings import RAY_ENDS_VARIABLE, READY_FILE_VARIABLE, Settings
from service.store.database import Database

logger = logging.getLogger("pathswitch.orchestrator")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings, parent = Settings(), os.getppid()
    database = Database(settings.database)
    artifacts = open_artifacts(settings.artifacts)
    artifacts.check()
    executor, serving = build_workers(settings, artifacts)
    stopping = threading.Event()

    def stop(number: int, frame: object) -> None:
        logger.info("stopping on signal %d", number)
        stopping.set()
        set_exit_deadline()

    # After ray.init, which installs its own handler.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    orchestrator = Orchestrator(database, artifacts, executor, serving, owner, settings.lease_seconds)
    ready = os.environ.get(READY_FILE_VARIABLE)
    try:
        tick_until(stopping, orchestrator, settings.tick_seconds, Path(ready) if ready else None)
    finally:
        # If the parent that owns the Ray cluster was killed, the cluster is ending too, and waiting for it would hang.
        if not (RAY_ENDS_VARIABLE in os.environ and os.getppid() != parent):
            close_workers(executor, serving)
            orchestrator.release_leases()
        database.close()


def tick_until(
    stopping: threading.Event, orchestrator: Orchestrator, tick_seconds: float, ready: Path | None = None
) -> None:
    """Tick until ``stopping``, pausing only after a tick that changed nothing. Touches ``ready`` once serving answers."""
    while not stopping.is_set():
        moved = orchestrator.tick()
        if ready and orchestrator.serving_answers:
            ready.touch()  # the parent process waits for this file
            ready = None
        if not moved:
            stopping.wait(tick_seconds)


def close_workers(executor: Executor, serving: Serving) -> None:
    """Close both concurrently, so that neither streams nor a training step delays the other."""
    with ThreadPoolExecutor(thread_name_prefix="close") as pool:
        for closed in [pool.submit(part.close) for part in (serving, executor)]:
            closed.result()


def build_workers(settings: Settings, artifacts: Artifacts) -> tuple[Executor, Serving]:
    """Build the executor and the serving implementation that the settings select, importing only what they need."""
    if settings.executor == "local":
        from workers.executors.local_executor import LocalExecutor
        from workers.serving.local_serving import LocalServing

        executor = LocalExecutor(artifacts, settings.local_processes)
        host, port = settings.serve_host, settings.serve_port
        return executor, LocalServing(artifacts, host, port, engine=settings.engine_options)

    import ray

    from workers.executors.ray_executor import RayExecutor
    from workers.executors.run_board import NAMESPACE
    from workers.serving.ray.serving import RayServing

    context = ray.init(address=settings.ray_address, namespace=NAMESPACE, log_to_driver=False)
    jobs_url = f"http://{context.dashboard_url}"
    ends = RAY_ENDS_VARIABLE in os.environ
    serving = RayServing(
        artifacts.url,
        settings.serve_host,
        settings.serve_port,
        engine=settings.engine_options,
        ends_with_us=ends,
    )
    return RayExecutor(artifacts, jobs_url, ends_with_us=ends), serving


if __name__ == "__main__":
    main()
