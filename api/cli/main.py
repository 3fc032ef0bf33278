"""The `pathswitch` command. Every command imports what it needs when it runs: help is there at once."""

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
    help="Keeps large language models up to date by learning-rate path switching.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
database = typer.Typer(help="The database.", no_args_is_help=True)
app.add_typer(database, name="db")
app.add_typer(datasets.app, name="dataset")
app.add_typer(models.app, name="model")
app.add_typer(updates.app, name="update")

Home = Annotated[
    Path | None, typer.Option(help="Folder of the database, the artifacts and the logs. [PATHSWITCH_HOME]")
]


def main() -> None:
    """Run the command line. The exit status is 0 only on success."""
    try:
        app()
    except Exception as error:
        problem = explain(error)
        if problem is None:
            raise
        print(problem.block(), file=sys.stderr)
        sys.exit(1)


@app.callback()
def connect(
    context: typer.Context,
    api: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="PATHSWITCH_API_URL",
            help="Where the control plane is; by default on this machine, at the port of the settings.",
        ),
    ] = None,
) -> None:
    context.obj = Connection(api)


@app.command()
def up(
    home: Home = None,
    api_port: Annotated[
        int | None, typer.Option(help="Of the control plane; 0: any free one. [PATHSWITCH_API_PORT]")
    ] = None,
    serve_port: Annotated[
        int | None, typer.Option(help="Of inference; 0: any free one. [PATHSWITCH_SERVE_PORT]")
    ] = None,
) -> None:
    """Start everything on this machine, in the foreground, until Ctrl-C."""
    from api.cli.up.run import up as run
    from service.settings import Settings

    given: dict[str, Any] = {"home": home, "api_port": api_port, "serve_port": serve_port}
    run(Settings(**{name: value for name, value in given.items() if value is not None}))


@app.command()
def demo(
    home: Annotated[Path | None, typer.Option(help="Keep it all in this folder.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running at the end, until Ctrl-C.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Train, update and serve a small model on this machine, under load, in minutes."""
    from api.cli.demo import demo as run

    run(home, keep=keep, json_file=json_file)


@app.command()
def study(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="Which rows to compare: a JSON file, as in deploy/study/.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder with `train/` and, best, `validation/`: one file a data version in each."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Results and report; results that are there are not trained again.")
    ] = Path("study"),
    home: Annotated[Path, typer.Option(help="Of the service it starts, without --api.")] = Path(
        ".pathswitch/study"
    ),
    processes: Annotated[
        int | None, typer.Option(help="Stages that train side by side; by default one a core.")
    ] = None,
    versions: Annotated[int | None, typer.Option(help="Only so many data versions of the folder.")] = None,
    cut: Annotated[
        str | None, typer.Option(help="Cut the text anew by date: `8` equal pieces, or shares: `10:10:10:3`.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after that long; the same command goes on later.")
    ] = None,
) -> None:
    """Compare paradigms on your own data: their cost, their quality, what they forget."""
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
    """Bring the database to the revision that this version expects."""
    from service.settings import Settings
    from service.store import migrate

    migrate.upgrade(Settings().database)


@database.command()
def backup(
    file: Annotated[Path, typer.Argument(help="Where the copy goes; it must not exist.")], home: Home = None
) -> None:
    """Copy the SQLite database while it is in use. Copy the artifacts after it, not before."""
    from service.settings import Settings
    from service.store.backup import backup

    backup((Settings() if home is None else Settings(home=home)).database, file)


@app.command()
def gc(
    home: Home = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it. Without, only say what would go.")
    ] = False,
    older_than: Annotated[
        float, typer.Option(min=1.0, metavar="HOURS", help="Nothing written since then is removed.")
    ] = 24.0,
    keep_versions: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Of model versions but the N newest of each model, keep only the exports that were released: what was "
            "never served goes, and so do the checkpoints that versions were exported from. By default all stay.",
        ),
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Name every one.")] = False,
) -> None:
    """Find artifacts that nothing needs any more, on the database and the store of the settings, and remove them.

    Data, released versions, the trunk's branch points and all that an unfinished or failed update may need stay.
    """
    from api.cli.garbage import collect
    from service.settings import Settings

    settings = Settings() if home is None else Settings(home=home)
    collect(
        settings, delete=delete, older_than_seconds=older_than * 3600, keep_versions=keep_versions, keys=keys
    )


@app.command()
def orchestrator() -> None:
    """Run the orchestrator: it has updates trained, checked and released."""
    _become("service.main")


@app.command()
def api() -> None:
    """Run the control plane: the HTTP API and the dashboard."""
    _become("api.main")


def _become(module: str) -> None:
    """Turn this process into another, which whoever started this one can signal and wait for as before."""
    os.execve(sys.executable, [sys.executable, "-m", module], os.environ | {"PYTHONSAFEPATH": "1"})


if __name__ == "__main__":
    main()
