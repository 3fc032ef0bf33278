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

app = typer.Typer(help="Models, their versions, and what is served.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Wait = Annotated[bool, typer.Option(help="Until every replica answers with it.")]
Reason = Annotated[str | None, typer.Option(help="For the history.")]
Rollout = Annotated[
    str | None,
    typer.Option(
        metavar="STRATEGY", help="replace, rolling, canary or shadow, instead of the model's own way."
    ),
]

_POLL_SECONDS = 0.5


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument()] = None,
    dataset: Annotated[str | None, typer.Option(help="What it is trained on.")] = None,
    preset: Annotated[str | None, typer.Option(help="An architecture by name: tiny, gpt2-124m, …")] = None,
    config: Annotated[Path | None, typer.Option(help="A transformers config.json.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="A folder with a model to start from, under the import roots.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Any field, e.g. training.peak_lr=1e-3. Repeatable."
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="The whole spec as JSON, instead of options.")] = None,
    as_json: Json = False,
) -> None:
    """Make a model: the line of versions that one dataset is trained into."""
    from api.cli import output
    from api.cli.spec import spec_of_file, spec_of_options, with_settings

    if file is not None:
        if any(option is not None for option in (name, dataset, preset, config, base)):
            raise CliError("--file has the whole spec: give only --set beside it")
        spec = spec_of_file(file)
    elif name is None or dataset is None:
        raise CliError("a model needs a name and a dataset", "pathswitch model create NAME --dataset DATASET")
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
    model: str,
    assignments: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="E.g. serving.rollout.strategy=canary. Repeatable."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Change what may change in a model's life: its gate, how it is served, whether it is updated by itself."""
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
    """List the models."""
    from api.cli import output, tables

    with client_of(context) as client:
        found = list(client.models())
    if as_json:
        output.print_json(found)
    else:
        output.print_table(tables.models(found))


@app.command()
def versions(context: typer.Context, model: str, as_json: Json = False) -> None:
    """List the versions of a model."""
    from api.cli import output, tables

    with client_of(context) as client:
        found = list(client.model_versions(model))
    if as_json:
        output.print_json(found)
    else:
        output.print_table(tables.versions(found))


@app.command()
def checkpoints(context: typer.Context, model: str, as_json: Json = False) -> None:
    """List the checkpoints of the trunk, which `update start --branch-from` takes."""
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
    model: str,
    tokens: Annotated[int | None, typer.Option(help="Of the next version, for the forecast.")] = None,
    as_json: Json = False,
) -> None:
    """Show what the versions cost, beside what other ways would have."""
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
    model: str,
    measure: Annotated[Measure, typer.Option("--of", help="What the table shows.")] = Measure.LOSS,
    as_json: Json = False,
) -> None:
    """Show every version on every slice, and how old slices fared since they were new."""
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
    model: str,
    version: int,
    rollout: Rollout = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Of the rollout, e.g. share=0.2. Repeatable."),
    ] = None,
    reason: Reason = None,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Serve this version, be it older or newer than the one that is served."""
    from api.cli.spec import with_settings

    if assignments and rollout is None:
        raise CliError("--set is of a rollout: give --rollout too")
    spec = None if rollout is None else with_settings({"strategy": rollout}, assignments or ())
    _release(context, model, version, reason, wait, as_json, rollout=spec)


@app.command()
def rollback(
    context: typer.Context, model: str, reason: Reason = None, wait: Wait = True, as_json: Json = False
) -> None:
    """Serve what was served before."""
    _release(context, model, "previous", reason, wait, as_json)


@app.command()
def serving(context: typer.Context, model: str, as_json: Json = False) -> None:
    """Show what should answer, and what every replica holds and has answered."""
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
            release = _settled(client, release)
    if as_json:
        output.print_json(release)
    if release.state in ("failed", "superseded"):
        raise CliError(
            f"version {release.version} of {model} is not served: {release.state}", release.error or ""
        )
    if not as_json:
        done = "is served" if release.released_at else "will be served"
        print(f"version {release.version} of {model} {done}")


def _settled(client: "Client", release: "Release") -> "Release":
    """The release once it is live, or will not be."""
    while release.state == "pending":
        time.sleep(_POLL_SECONDS)
        release = next(one for one in client.releases(release.model) if one.id == release.id)
    return release
