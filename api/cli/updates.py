"""`pathswitch update …`"""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from api.cli.connection import client_of
from api.cli.errors import CliError

if TYPE_CHECKING:
    from api.schemas.updates import Update

app = typer.Typer(help="Manage updates, which train data versions into model versions.", no_args_is_help=True)

ModelName = Annotated[str, typer.Argument(help="Name of the model.")]
UpdateId = Annotated[str, typer.Argument(help="Id of the update.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def start(
    context: typer.Context,
    model: ModelName,
    data_version: Annotated[
        int | None, typer.Option(help="Data version to train up to. Default: the newest.")
    ] = None,
    branch_from: Annotated[
        str | None,
        typer.Option(help="Train a one-off branch from this trunk checkpoint (see `model checkpoints`)."),
    ] = None,
    decay: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='Decay of the one-off branch, e.g. {"shape": "linear"}.'),
    ] = None,
    paradigm: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help='Train a one-off under this paradigm, e.g. {"name": "from_scratch"}.'
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the update until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Train the next version of a model, or a one-off version that the model line does not continue from."""
    with client_of(context) as client:
        update = client.start_update(
            model,
            data_version=data_version,
            branch_from=branch_from,
            decay=_object("--decay", decay),
            paradigm=_object("--paradigm", paradigm),
        )
    if follow:
        watch(context, update.id, as_json=as_json)
    else:
        _print_update(update, "will train", as_json)


@app.command()
def watch(
    context: typer.Context,
    update: Annotated[str | None, typer.Argument(help="Update id. Default: the running update.")] = None,
    model: Annotated[str | None, typer.Option(help="Watch the running update of this model.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the update as JSON when it has ended.")
    ] = False,
) -> None:
    """Watch an update until it ends. The exit status is 0 only if the update succeeded."""
    import sys

    from api.cli import output
    from api.cli.watch import choose
    from api.cli.watch import watch as follow

    if update is not None and model is not None:
        raise CliError("give either an update or --model, not both")
    with client_of(context) as client:
        update_id = update or choose(client, model)
        if update_id is None:
            raise CliError(
                "there is no update to watch", "Push a data version, or run `pathswitch update start MODEL`."
            )
        ended = follow(client, update_id, output.console(sys.stderr if as_json else sys.stdout))
    if as_json:
        output.print_json(ended)
    if ended.state != "succeeded":
        raise CliError(f"update {ended.id} {_failure(ended)}")


@app.command("list")
def list_(context: typer.Context, model: ModelName, as_json: Json = False) -> None:
    """List the updates of a model."""
    from api.cli import output

    with client_of(context) as client:
        found = list(client.updates(model))
    if as_json:
        output.print_json(found)
        return
    output.print_rows(
        ("update", ">data", "state", ">version", "created", ">took"),
        [
            (
                update.id,
                str(update.data_version),
                str(update.state),
                str(update.model_version or "–"),
                f"{update.created_at:%Y-%m-%d %H:%M}",
                output.duration((update.finished_at - update.started_at).total_seconds())
                if update.finished_at and update.started_at
                else "–",
            )
            for update in found
        ],
    )


@app.command()
def show(context: typer.Context, update: UpdateId, as_json: Json = False) -> None:
    """Show the state of an update."""
    from datetime import UTC, datetime

    from api.cli import output, watch_view
    from service.core.stage_specs import TRAINING_KINDS

    with client_of(context) as client:
        found = client.update(update)
        training = [stage for stage in found.stages if stage.kind in TRAINING_KINDS]
        points = {} if as_json else {stage.id: client.metrics(update, stage.id) for stage in training}
    if as_json:
        output.print_json(found)
        return
    out = output.console()
    out.print(watch_view.view(found, points, datetime.now(UTC), out.width))


@app.command()
def cancel(context: typer.Context, update: UpdateId, as_json: Json = False) -> None:
    """Cancel a pending or running update. The served version stays."""
    with client_of(context) as client:
        _print_update(client.cancel_update(update), "is cancelled: it will not train", as_json)


@app.command()
def retry(context: typer.Context, update: UpdateId, as_json: Json = False) -> None:
    """Continue a failed update from its last finished stage and checkpoint."""
    with client_of(context) as client:
        _print_update(client.retry_update(update), "continues to train", as_json)


def _object(option: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CliError(f"{option} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CliError(f"{option} is not a JSON object")
    return found


def _print_update(update: "Update", verb: str, as_json: bool) -> None:
    from api.cli import output

    if as_json:
        output.print_json(update)
    else:
        print(f"update {update.id} {verb} data version {update.data_version} of {update.model}")


def _failure(update: "Update") -> str:
    """Why the update did not succeed."""
    if update.error is not None:
        return f"{update.state}: {update.error.detail}"
    return f"was {update.state}"
