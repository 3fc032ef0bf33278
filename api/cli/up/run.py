"""`pathswitch up`: defines the parts of the service, how each is started, and what is printed about it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
from alembic.util import CommandError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from api.cli.connection import url_of
from api.cli.errors import CliError
from api.cli.up import ports
from api.cli.up.local_ray import LocalRay
from api.cli.up.record import HomeLock, ProcessRecord, end_leftovers
from api.cli.up.supervisor import Part, Supervisor
from service.artifacts import open_artifacts
from service.core.errors import PathswitchError
from service.core.stopping import PROCESS_SECONDS
from service.settings import RAY_ENDS_VARIABLE, READY_FILE_VARIABLE, Settings
from service.store import migrate

PROBE_SECONDS = 2.0
# Ray stops last, once nothing runs on it, and takes about 3 s.
RAY_GRACE_SECONDS = 5.0


def up(settings: Settings) -> None:
    """Run everything on this machine until a signal arrives. Raises CliError if the service cannot start."""
    home = settings.home.absolute()
    (home / "logs").mkdir(parents=True, exist_ok=True)
    with HomeLock(home):
        if ended := end_leftovers(home):
            say("home", f"ended {ended} processes left behind by a killed `pathswitch up`")
        settings = _with_ports(settings.model_copy(update={"home": home}))
        _prepare_stores(settings)
        _keep_last_logs(home / "logs")
        ray = LocalRay(home) if settings.executor == "ray" and settings.ray_address is None else None
        record = ProcessRecord(home, {"api": _api_url(settings), "serve": _serve_url(settings)})
        try:
            Supervisor(_parts(settings, ray), record, say, lambda: _announce(settings)).run()
        finally:
            if ray is not None:
                ray.clear()
        say("stopped")


def say(name: str, text: str = "") -> None:
    """Print one line.

    If the reader of stdout is gone, discard output from then on, so that parts can still be stopped.
    """
    try:
        print(f"pathswitch: {name:<15}{text}".rstrip(), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _with_ports(settings: Settings) -> Settings:
    """The settings with ports that can be used."""
    api = ports.usable_port(
        "control plane", settings.api_host, settings.api_port, "--api-port", "PATHSWITCH_API_PORT"
    )
    serve = ports.usable_port(
        "inference server", settings.serve_host, settings.serve_port, "--serve-port", "PATHSWITCH_SERVE_PORT"
    )
    if api == serve:
        raise CliError(
            f"the control plane and the inference server cannot both use port {api}",
            "Choose another with --api-port or --serve-port.",
        )
    return settings.model_copy(update={"api_port": api, "serve_port": serve})


def _prepare_stores(settings: Settings) -> None:
    url = make_url(settings.database)
    try:
        migrate.upgrade(settings.database)
    except (SQLAlchemyError, CommandError, PathswitchError, OSError) as error:
        raise CliError(f"the database {url.render_as_string()} cannot be used", str(error)) from error
    say("database", url.render_as_string())
    try:
        open_artifacts(settings.artifacts).check()
    except (OSError, ValueError) as error:
        raise CliError(f"the artifact store {settings.artifacts} cannot be used", str(error)) from error
    say("artifacts", settings.artifacts)


def _parts(settings: Settings, ray: LocalRay | None) -> list[Part]:
    """The parts in start order.

    The control plane needs no other part, so it is ready while Ray is still starting.
    """
    logs = settings.home / "logs"
    ready_file = settings.home / "orchestrator.ready"

    def environment() -> dict[str, str]:
        return _environment(settings) | (ray.client_environment() if ray else {})

    parts = []
    if ray is not None:
        head = Part(
            name="ray",
            ready=ray.ready,
            describe=lambda: f"{ray.address}, dashboard {ray.dashboard}",
            log=logs / "ray.log",
            command=ray.command,
            environment=lambda: _environment(settings) | ray.environment(),
            prepare=ray.prepare,
            grace_seconds=RAY_GRACE_SECONDS,
        )
        parts.append(head)
    elif settings.ray_address is not None:
        say("ray", f"{settings.ray_address} (external)")
    orchestrator = Part(
        name="orchestrator",
        ready=ready_file.exists,
        describe=lambda: f"log {logs / 'orchestrator.log'}",
        log=logs / "orchestrator.log",
        command=lambda: [sys.executable, "-m", "service.main"],
        environment=lambda: environment() | _orchestrator_environment(ready_file, ray),
        prepare=lambda: ready_file.unlink(missing_ok=True),
        needs=tuple(parts),
        grace_seconds=PROCESS_SECONDS,
    )
    control_plane = Part(
        name="control plane",
        ready=_answers(f"{_api_url(settings)}/readyz"),
        describe=lambda: _api_url(settings),
        log=logs / "api.log",
        command=lambda: [sys.executable, "-m", "api.main"],
        environment=environment,
        grace_seconds=PROCESS_SECONDS,
    )
    serve = Part(
        name="serve",
        ready=_answers(f"{_serve_url(settings)}/models"),
        describe=lambda: _serve_url(settings),
        log=logs / "orchestrator.log",
        needs=(orchestrator,),
    )
    return [*parts, orchestrator, control_plane, serve]


def _environment(settings: Settings) -> dict[str, str]:
    """The environment of every part."""
    environment = settings.environment() | {
        # Folders in the working directory named like our packages (`service`, `api`, …) must not shadow them.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Spinning OpenMP threads halve the speed of all other processes on a small machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("RAY_ADDRESS", None)  # it would override the address in the settings
    return environment


def _orchestrator_environment(ready_file: Path, ray: LocalRay | None) -> dict[str, str]:
    """Tell the orchestrator which file to create when ready, and whether `up` will stop its Ray."""
    environment = {READY_FILE_VARIABLE: str(ready_file)}
    return environment | ({RAY_ENDS_VARIABLE: "1"} if ray else {})


def _answers(url: str) -> Callable[[], bool]:
    def probe() -> bool:
        try:
            return httpx.get(url, timeout=PROBE_SECONDS, trust_env=False).is_success
        except httpx.TransportError:
            return False

    return probe


def _api_url(settings: Settings) -> str:
    return url_of(settings.api_host, settings.api_port)


def _serve_url(settings: Settings) -> str:
    return url_of(settings.serve_host, settings.serve_port) + "/v1"


def _keep_last_logs(folder: Path) -> None:
    for log in folder.glob("*.log"):
        log.replace(log.with_suffix(".log.1"))


def _announce(settings: Settings) -> None:
    print(
        f"pathswitch: ready\n  control plane  {_api_url(settings)}\n  inference      {_serve_url(settings)}",
        flush=True,
    )
