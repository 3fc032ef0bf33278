"""The orchestrator process: the one place that joins the service and the workers. ``python -m service.main``.

Reads its settings from the environment, connects to Ray (unless the executor is local), and ticks until SIGTERM. Then
what runs in it, or in a Ray that ends with it, is brought to a good end; what runs in a Ray that stays goes on.
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
from service.settings import Settings
from service.store.database import Database

logger = logging.getLogger("pathswitch.orchestrator")

READY_FILE_VARIABLE = "PATHSWITCH_READY_FILE"
RAY_ENDS_VARIABLE = "PATHSWITCH_RAY_ENDS"
"""Set by whoever ends the Ray cluster as soon as this process has ended."""


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

    # After ray.init, which puts a handler of its own in place.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    orchestrator = Orchestrator(database, artifacts, executor, serving, owner, settings.lease_seconds)
    ready = os.environ.get(READY_FILE_VARIABLE)
    try:
        tick_until(stopping, orchestrator, settings.tick_seconds, Path(ready) if ready else None)
    finally:
        # Where who ends the Ray was killed, that is ending as well: it would be waited for in vain, and the next start with it.
        if not (RAY_ENDS_VARIABLE in os.environ and os.getppid() != parent):
            bring_to_an_end(executor, serving)
            orchestrator.release_leases()
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


def bring_to_an_end(executor: Executor, serving: Serving) -> None:
    """Both at once: a stream goes on to its end while a training step does."""
    with ThreadPoolExecutor(thread_name_prefix="ending") as ending:
        for each in [ending.submit(part.close) for part in (serving, executor)]:
            each.result()


def build_workers(settings: Settings, artifacts: Artifacts) -> tuple[Executor, Serving]:
    """The executor and the serving side that the settings ask for. Imports only what they need."""
    if settings.executor == "local":
        from workers.local_executor import LocalExecutor
        from workers.serving.local_serving import LocalServing

        executor = LocalExecutor(artifacts, settings.local_processes)
        host, port = settings.serve_host, settings.serve_port
        return executor, LocalServing(artifacts, host, port, engine=settings.engine_options)

    import ray

    from workers.ray_executor import RayExecutor
    from workers.run_board import NAMESPACE
    from workers.serving.ray_serving import RayServing

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
