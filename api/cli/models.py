"""`pathswitch model …`"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from api.cli.connection import client_of
from api.cli.errors import CliError
from service.core.forgetting import Measure

if TYPE_CHECKING:
    from api.client import Client
    from api.schemas.releases import Release

app = typer.Typer(help="Manage models, their versions, and which version is served.", no_args_is_help=True)

ModelName = Annotated[str, typer.Argument(help="Name of the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Wait = Annotated[bool, typer.Option(help="Wait until every replica answers with the version.")]
Reason = Annotated[str | None, typer.Option(help="Reason, for the release history.")]
Rollout = Annotated[
    str | None,
    typer.Option(
        metavar="STRATEGY", help="replace, rolling, canary or shadow. Default: the model's own strategy."
    ),
]

_POLL_SECONDS = 0.5


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Name of the model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Dataset to train on.")] = None,
    preset: Annotated[str | None, typer.Option(help="Architecture preset: tiny, gpt2-124m, …")] = None,
    config: Annotated[Path | None, typer.Option(help="Architecture from a transformers config.json.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of a model to start from, under the import roots.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Set any field, e.g. training.peak_lr=1e-3. Repeatable."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="JSON file with the complete spec, instead of the other options.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a model, which is trained on one dataset and updated with its data versions."""
    from api.cli import output
    from api.cli.spec import spec_of_file, spec_of_options, with_settings

    if file is not None:
        if any(option is not None for option in (name, dataset, preset, config, base)):
            raise CliError("--file contains the complete spec: only --set can be combined with it")
        spec = spec_of_file(file)
    elif name is None or dataset is None:
        raise CliError(
            "a model needs a name and a dataset", "Usage: pathswitch model create NAME --dataset DATASET"
        )
    else:
        spec = spec_of_options(name, dataset, preset, config, base)
    with client_of(context) as client:
        model = client.create_model(with_settings(spec, assignments or ()))
    if as_json:
        output.print_json(model)
    else:
        started = f"; update {model.state.update} has started" if model.state.update else ""
        print(f"created model {model.name} on dataset {model.dataset}{started}")


@app.command()
def change(
    context: typer.Context,
    model: ModelName,
    assignments: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Set a field, e.g. serving.rollout.strategy=canary. Repeatable.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Change a model's gate, serving, training workers, auto_update or auto_release."""
    from api.cli import output
    from api.cli.spec import with_settings

    with client_of(context) as client:
        changed = client.change_model(model, with_settings({}, assignments))
    if as_json:
        output.print_json(changed)
    else:
        print(f"changed model {changed.name}")


@app.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """List all models."""
    from api.cli import output, tables

    with client_of(context) as client:
        found = list(client.models())
    if as_json:
        output.print_json(found)
    else:
        output.print_table(tables.models(found))


@app.command()
def versions(context: typer.Context, model: ModelName, as_json: Json = False) -> None:
    """List the versions of a model."""
    from api.cli import output, tables

    with client_of(context) as client:
        found = list(client.model_versions(model))
    if as_json:
        output.print_json(found)
    else:
        output.print_table(tables.versions(found))


@app.command()
def checkpoints(context: typer.Context, model: ModelName, as_json: Json = False) -> None:
    """List the trunk checkpoints of a model, for `update start --branch-from`."""
    from api.cli import output, tables

    with client_of(context) as client:
        found = list(client.checkpoints(model))
    if as_json:
        output.print_json(found)
    else:
        output.print_table(tables.checkpoints(found))


@app.command()
def costs(
    context: typer.Context,
    model: ModelName,
    tokens: Annotated[int | None, typer.Option(help="Tokens in the next version, for the forecast.")] = None,
    as_json: Json = False,
) -> None:
    """Show what each version cost, compared with training from scratch."""
    from api.cli import output, tables

    with client_of(context) as client:
        found = client.costs(model, tokens=tokens)
    if as_json:
        output.print_json(found)
        return
    output.print_table(tables.costs(found))
    print(tables.costs_in_words(found))


@app.command()
def forgetting(
    context: typer.Context,
    model: ModelName,
    measure: Annotated[Measure, typer.Option("--of", help="Measure to show.")] = Measure.LOSS,
    as_json: Json = False,
) -> None:
    """Show the quality of every version on every slice, and the change on old slices."""
    from api.cli import output, tables

    with client_of(context) as client:
        found = client.forgetting(model)
    if as_json:
        output.print_json(found)
    else:
        output.print_table(tables.forgetting(found, measure))


@app.command()
def release(
    context: typer.Context,
    model: ModelName,
    version: Annotated[int, typer.Argument(help="Number of the version.")],
    rollout: Rollout = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Set a field of the rollout, e.g. share=0.2. Repeatable."
        ),
    ] = None,
    reason: Reason = None,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Serve a version of the model, older or newer than the one served now."""
    from api.cli.spec import with_settings

    if assignments and rollout is None:
        raise CliError("--set needs --rollout: it sets fields of the rollout")
    spec = None if rollout is None else with_settings({"strategy": rollout}, assignments or ())
    _release(context, model, version, reason, wait, as_json, rollout=spec)


@app.command()
def rollback(
    context: typer.Context, model: ModelName, reason: Reason = None, wait: Wait = True, as_json: Json = False
) -> None:
    """Serve the version that was served before the current one."""
    _release(context, model, "previous", reason, wait, as_json)


@app.command()
def serving(context: typer.Context, model: ModelName, as_json: Json = False) -> None:
    """Show which version should be served, and the state and traffic of every replica."""
    from api.cli import output, tables

    with client_of(context) as client:
        found = client.serving(model)
    if as_json:
        output.print_json(found)
        return
    output.print_table(tables.serving(found))
    print(tables.serving_in_words(found))


def _release(
    context: typer.Context,
    model: str,
    version: int | str,
    reason: str | None,
    wait: bool,
    as_json: bool,
    *,
    rollout: dict[str, Any] | None = None,
) -> None:
    from api.cli import output

    with client_of(context) as client:
        release = client.release(model, version, reason=reason, rollout=rollout)
        if wait:
            release = _wait_until_settled(client, release)
    if as_json:
        output.print_json(release)
    if release.state in ("failed", "superseded"):
        raise CliError(
            f"version {release.version} of {model} is not served: {release.state}", release.error or ""
        )
    if not as_json:
        state = "is now served" if release.released_at else "is being rolled out"
        print(f"version {release.version} of {model} {state}")


def _wait_until_settled(client: "Client", release: "Release") -> "Release":
    """Poll the release until it is live, failed or superseded."""
    while release.state == "pending":
        time.sleep(_POLL_SECONDS)
        release = next(row for row in client.releases(release.model) if row.id == release.id)
    return release
