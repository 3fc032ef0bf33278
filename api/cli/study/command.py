"""`pathswitch study`: paradigms compared on one's own data, as model lines of a service, with a report at the end."""

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
from api.cli.study.data import load_data, shares_of
from api.cli.study.lines import mean_perplexity, num_lines, study_plan
from api.cli.study.report import write_report
from api.cli.study.results import CommandRun, LineResult, Results, open_results, save_results
from api.cli.study.runner import StudyProgress, StudyRun
from api.client import Client

# Lines that share a trunk wait for each other: with more than run at once, there is another to train meanwhile.
_IN_FLIGHT_PER_PROCESS = 3


@dataclass(frozen=True)
class Options:
    """``api``: of a service that runs; None: one of its own, with ``processes`` that train, in ``home``."""

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
    """Raises CliError where lines have failed, or time was up before all were trained: what there is, is kept and reported."""
    console = output.console()
    config = load_config(options.config)
    cut = shares_of(options.cut) if options.cut is not None else None
    data = load_data(options.data, versions=options.versions, cut=cut)
    results = open_results(options.out, config, data)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    began = datetime.now(UTC)
    before = results.lines
    raise_on_sigterm()
    complete = False
    with _progress(console, config, results) as (show, keep):
        latest = [results]

        def save(now: Results) -> None:
            save_results(options.out, now)
            latest[0] = now
            keep(now)

        try:
            with _service(options) as url, Client(url) as client:
                in_flight = _IN_FLIGHT_PER_PROCESS * options.processes
                run = StudyRun(client, config, data, results, in_flight=in_flight, save=save, show=show)
                complete = run.run(deadline)
        finally:
            results = latest[0]
            made = [name for name, line in results.lines.items() if before.get(name) != line]
            if made:
                part = _part(options, began, len(made))
                results = results.model_copy(update={"parts": (*results.parts, part)})
                save_results(options.out, results)
    report = write_report(options.out, results)
    if report is not None:
        console.print(
            f"The report is {report}, and {report.with_suffix('.html').name} beside it.", markup=False
        )
    wanted = {line.name for line in study_plan(config, results)}
    errors = [
        (name, line) for name, line in results.lines.items() if name in wanted and line.error is not None
    ]
    for name, line in errors:
        console.print(f"{name}: {line.error}", markup=False)
    if not complete:
        raise CliError(
            "{} of {} lines are trained".format(*_counts(config, results)),
            f"The same command goes on from {options.out}.",
        )
    if failed := [(name, line.error or "") for name, line in errors if not line.settled]:
        raise CliError("lines have failed", "The same command tries them again.", failed)


@contextmanager
def _service(options: Options) -> Iterator[str]:
    """Where the control plane is."""
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
    """One bar, in lines; where nobody looks, a text line for every line that is complete."""
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

        def keep(now: Results) -> None:
            nonlocal done, total
            done, total = _counts(config, now)
            bars.update(task, total=total)
            for name, line in now.lines.items():
                if shown.get(name) != line:
                    shown[name] = line
                    console.print(_told(done, total, line), markup=False)

        yield show, keep


def _counts(config: StudyConfig, results: Results) -> tuple[int, int]:
    """Of the lines that the study is of: how many have a result, and all. A file may hold those of rows before they changed."""
    planned = {line.name for line in study_plan(config, results)}
    return len(planned & results.lines.keys()), num_lines(config, results)


def _told(number: int, total: int, line: LineResult) -> str:
    at = f"{datetime.now():%H:%M:%S} {number}/{total} {line.row}, seed {line.seed}, peak {line.peak_lr:g}"
    if line.error is not None or not line.versions:
        return f"{at}: {line.error}"
    newest = line.versions[-1]
    seconds = sum(version.device_seconds for version in line.versions)
    return f"{at}: mean perplexity {mean_perplexity(newest):.2f}, trained for {output.duration(seconds)}"


def _part(options: Options, began: datetime, lines: int) -> CommandRun:
    """The command without what does not change its results, and without the folders of this machine."""
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
