"""The `pathswitch` command. Commands import what they need when they run, so that `--help` stays fast."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from api.cli import datasets, models, updates
from api.cli.connection import Connection
from api.cli.errors import explain

app = typer.Typer(
    name="pathswitch",
    help="Keep large language models up to date by learning-rate path switching.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
database = typer.Typer(help="Migrate and back up the database.", no_args_is_help=True)
app.add_typer(database, name="db")
app.add_typer(datasets.app, name="dataset")
app.add_typer(models.app, name="model")
app.add_typer(updates.app, name="update")

Home = Annotated[
    Path | None, typer.Option(help="Folder for the database, the artifacts and the logs. [PATHSWITCH_HOME]")
]


def main() -> None:
    """Run the command line. The exit status is 0 only on success."""
    try:
        app()
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        print(explanation.block(), file=sys.stderr)
        sys.exit(1)


@app.callback()
def connect(
    context: typer.Context,
    api: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="PATHSWITCH_API_URL",
            help="URL of the control plane. Default: this machine, at PATHSWITCH_API_PORT.",
        ),
    ] = None,
) -> None:
    context.obj = Connection(api)


@app.command()
def up(
    home: Home = None,
    api_port: Annotated[
        int | None, typer.Option(help="Port of the control plane; 0 picks a free one. [PATHSWITCH_API_PORT]")
    ] = None,
    serve_port: Annotated[
        int | None,
        typer.Option(help="Port of the inference API; 0 picks a free one. [PATHSWITCH_SERVE_PORT]"),
    ] = None,
) -> None:
    """Run the whole service on this machine, in the foreground, until Ctrl-C."""
    from api.cli.up.run import up as run
    from service.settings import Settings

    options: dict[str, Any] = {"home": home, "api_port": api_port, "serve_port": serve_port}
    run(Settings(**{name: value for name, value in options.items() if value is not None}))


@app.command()
def demo(
    home: Annotated[
        Path | None, typer.Option(help="Folder to run in and keep. Default: a temporary one.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the service running at the end, until Ctrl-C.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all measurements to this file.")
    ] = None,
) -> None:
    """Train, update and serve a small model on this machine, under load, within minutes."""
    from api.cli.demo import demo as run

    run(home, keep=keep, json_file=json_file)


@app.command()
def study(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(help="JSON file of the rows to compare; see deploy/study/ for examples.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder with `train/` and preferably `validation/`, each with one file per data version."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the results and the report. Lines that have a result there are not trained again."
        ),
    ] = Path("study"),
    home: Annotated[
        Path, typer.Option(help="Home of the service that the study starts if --api is not given.")
    ] = Path(".pathswitch/study"),
    processes: Annotated[
        int | None, typer.Option(help="Number of stages to train in parallel. Default: one per core.")
    ] = None,
    versions: Annotated[
        int | None, typer.Option(help="Use only the first N data versions of the folder.", metavar="N")
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option(
            help="Cut the text into new data versions by date: `8` equal pieces, or shares such as `10:10:10:3`."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this many minutes. The same command continues later.")
    ] = None,
) -> None:
    """Compare paradigms on your own data: cost, quality and forgetting."""
    from api.cli.study.command import Options
    from api.cli.study.command import study as run

    connection = context.find_object(Connection)
    assert connection is not None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run(
        Options(
            config=config,
            data=data,
            out=out,
            home=home,
            api=connection.url,
            processes=processes or cores,
            versions=versions,
            cut=cut,
            minutes=minutes,
        )
    )


@database.command()
def upgrade() -> None:
    """Migrate the database to the revision that this version of Pathswitch needs."""
    from service.settings import Settings
    from service.store import migrate

    migrate.upgrade(Settings().database)


@database.command()
def backup(
    file: Annotated[Path, typer.Argument(help="File to write the copy to. It must not exist.")],
    home: Home = None,
) -> None:
    """Copy the SQLite database while it is in use. Copy the artifacts afterwards, not before."""
    from service.settings import Settings
    from service.store.backup import backup

    backup((Settings() if home is None else Settings(home=home)).database, file)


@app.command()
def gc(
    home: Home = None,
    delete: Annotated[
        bool,
        typer.Option("--delete", help="Delete the artifacts. Without it, only list what would be deleted."),
    ] = False,
    older_than: Annotated[
        float,
        typer.Option(
            min=1.0, metavar="HOURS", help="Keep artifacts that were written more recently than this."
        ),
    ] = 24.0,
    keep_versions: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Keep everything that belongs to the N newest versions of each model. For older ones, delete unreleased "
            "exports and the checkpoints that versions were exported from. Default: keep all versions.",
        ),
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every artifact by its key.")] = False,
) -> None:
    """Find artifacts that nothing needs any more, and delete them with --delete.

    It keeps data, released versions, branch points of trunks, and what unfinished or failed updates may need.
    """
    from api.cli.garbage import collect
    from service.settings import Settings

    settings = Settings() if home is None else Settings(home=home)
    collect(
        settings, delete=delete, older_than_seconds=older_than * 3600, keep_versions=keep_versions, keys=keys
    )


@app.command()
def orchestrator() -> None:
    """Run the orchestrator, which trains, evaluates and releases updates."""
    _exec_module("service.main")


@app.command()
def api() -> None:
    """Run the control plane, which serves the HTTP API."""
    _exec_module("api.main")


def _exec_module(module: str) -> None:
    """Replace this process by a Python module, under the same pid, so that signals and waits keep working."""
    os.execve(sys.executable, [sys.executable, "-m", module], os.environ | {"PYTHONSAFEPATH": "1"})


if __name__ == "__main__":
    main()
