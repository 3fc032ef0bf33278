"""`pathswitch dataset …`"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli.connection import client_of
from api.cli.errors import CliError, explain

if TYPE_CHECKING:
    from api.client import Client, DataFormat, ProgressCallback
    from api.schemas.data import DataVersion

app = typer.Typer(help="Manage datasets and their data versions.", no_args_is_help=True)

DatasetName = Annotated[str, typer.Argument(help="Name of the dataset.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_CHUNK_BYTES = 1 << 18
_VERSION_COLUMNS = (
    ">version",
    "label",
    ">documents",
    ">duplicates",
    ">holdout",
    ">bytes",
    "created",
    "sha256",
)


@app.command()
def create(
    context: typer.Context,
    name: DatasetName,
    description: Annotated[str | None, typer.Option(help="What the dataset contains.")] = None,
    holdout: Annotated[
        float | None,
        typer.Option(help="Fraction of each version's documents to hold out for evaluation. Default: 0.02."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a dataset."""
    from api.cli import output

    with client_of(context) as client:
        dataset = client.create_dataset(name, description=description, holdout_fraction=holdout)
    if as_json:
        output.print_json(dataset)
    else:
        print(f"created dataset {dataset.name}")


@app.command("list")
def list_(
    context: typer.Context,
    dataset: Annotated[str | None, typer.Argument(help="List the data versions of this dataset.")] = None,
    as_json: Json = False,
) -> None:
    """List all datasets, or the data versions of one dataset."""
    from api.cli import output

    with client_of(context) as client:
        if dataset is not None:
            _show_versions(list(client.data_versions(dataset)), as_json)
            return
        found = list(client.datasets())
    if as_json:
        output.print_json(found)
        return
    output.print_rows(
        ("dataset", ">versions", ">holdout", "created", "description"),
        [
            (
                row.name,
                str(row.latest_version or 0),
                f"{row.holdout_fraction:g}",
                f"{row.created_at:%Y-%m-%d %H:%M}",
                row.description or "",
            )
            for row in found
        ],
    )


@app.command()
def push(
    context: typer.Context,
    dataset: DatasetName,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE…",
            help="Each file becomes one data version, in this order: .ndjson, .jsonl, .txt or .parquet, also "
            "with .gz or .zst; - reads standard input; the service itself reads s3:// and file:// URIs.",
        ),
    ],
    label: Annotated[str | None, typer.Option(help="Label of the data version.")] = None,
    format: Annotated[
        str | None, typer.Option(help="ndjson, text or parquet. Default: from the file name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Push files as the next data versions."""
    from api.client import DataFormat

    if label is not None and len(files) > 1:
        raise CliError("--label needs a single file", "Each file becomes a data version of its own.")
    if format is not None and format not in list(DataFormat):
        raise CliError(f"--format {format} is not one of {', '.join(DataFormat)}")
    data_format = DataFormat(format) if format is not None else None
    pushed = []
    with client_of(context) as client:
        for file in files:
            try:
                pushed.append(_push(client, dataset, file, data_format, label))
            except Exception as error:
                explanation = explain(error)
                if explanation is None:
                    raise
                title = f"{file}: {explanation.title}"
                raise CliError(title, explanation.detail, explanation.errors) from error
    _show_versions(pushed, as_json)


@app.command()
def exclude(
    context: typer.Context,
    dataset: DatasetName,
    number: Annotated[int, typer.Argument(help="Number of the data version.")],
    reason: Annotated[str, typer.Option(help="Why it is excluded, for the history.")],
    as_json: Json = False,
) -> None:
    """Exclude a data version from training. Models rewind to before it at their next update."""
    from api.cli import output

    with client_of(context) as client:
        excluded = client.exclude_version(dataset, number, reason)
    if as_json:
        output.print_json(excluded)
        return
    print(f"excluded data version {number} of {dataset}")
    if excluded.affected_versions:
        output.print_rows(
            ("trained on it", ">version", "state"),
            [(row.model, str(row.number), str(row.state)) for row in excluded.affected_versions],
        )


def _push(
    client: "Client", dataset: str, file: str, format: "DataFormat | None", label: str | None
) -> "DataVersion":
    if "://" in file:
        version, created = client.import_version(dataset, file, format=format, label=label)
    else:
        source = _standard_input() if file == "-" else Path(file)
        total = source.stat().st_size if isinstance(source, Path) else None
        with upload_progress(file, total) as progress:
            version, created = client.push_version(
                dataset, source, format=format, label=label, progress=progress
            )
    if not created:
        print(f"{file}: already registered as data version {version.number}", file=sys.stderr)
    return version


@contextmanager
def upload_progress(name: str, total: int | None) -> Iterator["ProgressCallback"]:
    """A progress bar on stderr if that is a terminal. The callback takes the number of bytes just sent."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from api.cli import output

    screen = output.console(sys.stderr)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bars:
        task = bars.add_task(name, total=total)

        def advance(num_bytes: int) -> None:
            bars.advance(task, num_bytes)
            if total is not None and bars.tasks[task].completed >= total:
                bars.update(task, description=f"{name}: sent, waiting for the service")

        yield advance


def _standard_input() -> Iterator[bytes]:
    while chunk := sys.stdin.buffer.read(_CHUNK_BYTES):
        yield chunk


def _show_versions(versions: "list[DataVersion]", as_json: bool) -> None:
    from api.cli import output

    if as_json:
        output.print_json(versions)
        return
    output.print_rows(
        _VERSION_COLUMNS,
        [
            (
                str(version.number),
                version.label or "",
                f"{version.documents:,}",
                f"{version.duplicates:,}",
                f"{version.holdout_documents:,}",
                output.size(version.bytes),
                f"{version.created_at:%Y-%m-%d %H:%M}",
                version.sha256[:12],
            )
            for version in versions
        ],
    )
