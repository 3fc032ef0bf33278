"""`pathswitch study`: compares paradigms on the user's data.

It trains model lines with a service and writes a report.
"""

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from api.cli import output
from api.cli.child_service import ChildService, raise_on_sigterm
from api.cli.errors import CliError
from api.cli.study.config import StudyConfig, load_config
from api.cli.study.data import load_data, parse_shares
from api.cli.study.lines import mean_perplexity, num_lines, study_plan
from api.cli.study.report import write_report
from api.cli.study.results import CommandRun, LineResult, Results, open_results, save_results
from api.cli.study.runner import StudyProgress, StudyRun
from api.client import Client

# Lines that share a trunk wait for each other, so more lines must be in flight than can train at once.
_IN_FLIGHT_PER_PROCESS = 3


@dataclass(frozen=True)
class Options:
    """Options of the command.

    Without ``api``, the study runs its own service in ``home``, with ``processes`` workers.
    """

    config: Path
    data: Path
    out: Path
    home: Path
    api: str | None
    processes: int
    versions: int | None
    cut: str | None
    minutes: float | None


def study(options: Options) -> None:
    """Run a study, or continue it.

    Raises CliError if lines failed or time ran out; finished lines are kept and reported.
    """
    console = output.console()
    config = load_config(options.config)
    cut = parse_shares(options.cut) if options.cut is not None else None
    data = load_data(options.data, versions=options.versions, cut=cut)
    results = open_results(options.out, config, data)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    began = datetime.now(UTC)
    before = results.lines
    raise_on_sigterm()
    complete = False
    with _progress(console, config, results) as (show, note_results):
        latest = [results]

        def save(updated: Results) -> None:
            save_results(options.out, updated)
            latest[0] = updated
            note_results(updated)

        try:
            with _service(options) as url, Client(url) as client:
                in_flight = _IN_FLIGHT_PER_PROCESS * options.processes
                run = StudyRun(client, config, data, results, in_flight=in_flight, save=save, show=show)
                complete = run.run(deadline)
        finally:
            results = latest[0]
            new_lines = [name for name, line in results.lines.items() if before.get(name) != line]
            if new_lines:
                run_record = _command_run(options, began, len(new_lines))
                results = results.model_copy(update={"parts": (*results.parts, run_record)})
                save_results(options.out, results)
    report = write_report(options.out, results)
    if report is not None:
        console.print(
            f"Wrote {report} and {report.with_suffix('.html').name} in the same folder.", markup=False
        )
    planned = {line.name for line in study_plan(config, results)}
    errors = [
        (name, line) for name, line in results.lines.items() if name in planned and line.error is not None
    ]
    for name, line in errors:
        console.print(f"{name}: {line.error}", markup=False)
    if not complete:
        raise CliError(
            "only {} of {} lines are trained".format(*_counts(config, results)),
            f"Run the same command again to continue from {options.out}.",
        )
    if failed := [(name, line.error or "") for name, line in errors if not line.settled]:
        raise CliError("some lines failed", "Run the same command again to retry them.", failed)


@contextmanager
def _service(options: Options) -> Iterator[str]:
    """Run the service for the duration of the block if necessary, and yield its URL."""
    if options.api is not None:
        yield options.api
        return
    settings = {
        "PATHSWITCH_EXECUTOR": "local",
        "PATHSWITCH_LOCAL_PROCESSES": str(options.processes),
    }
    with ChildService(options.home.absolute(), lambda text: None, settings) as service:
        yield service.api_url


@contextmanager
def _progress(
    console: Console, config: StudyConfig, results: Results
) -> Iterator[tuple[Callable[[StudyProgress], None], Callable[[Results], None]]]:
    """A progress bar that counts lines, and a line of text for every finished line.

    Yields its two callbacks.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    shown = dict(results.lines)
    done, total = _counts(config, results)
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("starting", total=total, completed=done)

        def show(progress: StudyProgress) -> None:
            names = ", ".join(name.rpartition(".")[0] for name in progress.active)
            bars.update(task, completed=done + sum(progress.active.values()), description=names[:60])

        def note_results(updated: Results) -> None:
            nonlocal done, total
            done, total = _counts(config, updated)
            bars.update(task, total=total)
            for name, line in updated.lines.items():
                if shown.get(name) != line:
                    shown[name] = line
                    console.print(_summary(done, total, line), markup=False)

        yield show, note_results


def _counts(config: StudyConfig, results: Results) -> tuple[int, int]:
    """Number of planned lines that have a result, and of all planned lines.

    Results of changed rows do not count.
    """
    planned = {line.name for line in study_plan(config, results)}
    return len(planned & results.lines.keys()), num_lines(config, results)


def _summary(number: int, total: int, line: LineResult) -> str:
    """One line of text about a finished line."""
    prefix = f"{datetime.now():%H:%M:%S} {number}/{total} {line.row}, seed {line.seed}, peak {line.peak_lr:g}"
    if line.error is not None or not line.versions:
        return f"{prefix}: {line.error}"
    newest = line.versions[-1]
    seconds = sum(version.device_seconds for version in line.versions)
    return f"{prefix}: mean perplexity {mean_perplexity(newest):.2f}, trained in {output.duration(seconds)}"


def _command_run(options: Options, began: datetime, lines: int) -> CommandRun:
    """A record of this run.

    The command leaves out options that do not affect results, and folders of this machine.
    """
    arguments = ["pathswitch", "study", options.config.name, options.data.resolve().name]
    if options.versions is not None:
        arguments += ["--versions", str(options.versions)]
    if options.cut is not None:
        arguments += ["--cut", options.cut]
    return CommandRun(
        command=shlex.join(arguments),
        began=f"{began:%Y-%m-%dT%H:%M:%SZ}",
        ended=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        lines=lines,
        machine=f"{os.cpu_count()} CPU cores",
    )
