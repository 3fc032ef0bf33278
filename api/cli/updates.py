"""`pathswitch update …`"""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from api.cli.connection import client_of
from api.cli.errors import CliError

if TYPE_CHECKING:
    from api.schemas.updates import Update

app = typer.Typer(help="Updates: how a data version becomes a model version.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def start(
    context: typer.Context,
    model: str,
    data_version: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    branch_from: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint of the trunk (`model checkpoints`): a branch from there, to look at."
        ),
    ] = None,
    decay: Annotated[
        str | None, typer.Option(metavar="JSON", help='Of that branch, e.g. {"shape": "linear"}.')
    ] = None,
    paradigm: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='Another than the model\'s, once, e.g. {"name": "from_scratch"}.'),
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Show it until it has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Train a data version into a version of this model: the line's next, or a one-off that it does not go on from."""
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
        _tell(update, "will train", as_json)


@app.command()
def watch(
    context: typer.Context,
    update: Annotated[str | None, typer.Argument(help="Default: the one that is running.")] = None,
    model: Annotated[str | None, typer.Option(help="The running update of this model.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the update as JSON when it has ended.")
    ] = False,
) -> None:
    """Show an update until it has ended. The exit status is 0 only if it succeeded."""
    import sys

    from api.cli import output
    from api.cli.watch import choose
    from api.cli.watch import watch as follow

    if update is not None and model is not None:
        raise CliError("give an update or a model, not both")
    with client_of(context) as client:
        update_id = update or choose(client, model)
        if update_id is None:
            raise CliError(
                "there is no update to watch", "Push a data version, or `pathswitch update start MODEL`."
            )
        ended = follow(client, update_id, output.console(sys.stderr if as_json else sys.stdout))
    if as_json:
        output.print_json(ended)
    if ended.state != "succeeded":
        raise CliError(f"update {ended.id} {_outcome(ended)}")


@app.command("list")
def list_(context: typer.Context, model: str, as_json: Json = False) -> None:
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
                one.id,
                str(one.data_version),
                str(one.state),
                str(one.model_version or "–"),
                f"{one.created_at:%Y-%m-%d %H:%M}",
                output.duration((one.finished_at - one.started_at).total_seconds())
                if one.finished_at and one.started_at
                else "–",
            )
            for one in found
        ],
    )


@app.command()
def show(context: typer.Context, update: str, as_json: Json = False) -> None:
    """Show how an update stands."""
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
def cancel(context: typer.Context, update: str, as_json: Json = False) -> None:
    """End an update that has not ended. What is served stays."""
    with client_of(context) as client:
        _tell(client.cancel_update(update), "is cancelled:", as_json)


@app.command()
def retry(context: typer.Context, update: str, as_json: Json = False) -> None:
    """Go on with a failed update, from its last good stage and checkpoint."""
    with client_of(context) as client:
        _tell(client.retry_update(update), "goes on with", as_json)


def _object(option: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CliError(f"{option} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CliError(f"{option} is not a JSON object")
    return found


def _tell(update: "Update", does: str, as_json: bool) -> None:
    from api.cli import output

    if as_json:
        output.print_json(update)
    else:
        print(f"update {update.id} {does} data version {update.data_version} of {update.model}")


def _outcome(update: "Update") -> str:
    """Why it did not succeed, as far as the update says."""
    if update.error is not None:
        return f"{update.state}: {update.error.detail}"
    return f"was {update.state}"
