"""Small specs to plan and train with."""

from typing import Any

from service.core.artifact_files import HOLDOUT
from service.core.ledger import LedgerEntry, steps_of
from service.core.paradigm_specs import BranchSpec, DecaySpec, ParadigmSpec, PathSwitchingSpec
from service.core.plan import PlanContext
from service.core.specs import ArchitectureSpec, GateSpec
from service.core.stage_specs import LineSpec, Numerics, SliceRef, holdout_name

# Settings of a model whose steps are easy to count: no replay, and branches of a tenth of all steps.
PLAIN: dict[str, Any] = {
    "training": {"replay_fraction": 0.0},
    "paradigm": {
        "name": "path_switching",
        "decay": {"length": {"rule": "proportional", "fraction": 0.1}, "replay_fraction": 0.0},
    },
}


def line_spec(**changes: Any) -> LineSpec:
    """A line of the tiny preset on a CPU, with ``changes``."""
    values: dict[str, Any] = {
        "architecture": ArchitectureSpec(preset="tiny"),
        "tokenizer_key": "tokenizer/t",
        "numerics": Numerics(),
        "sequence_length": 128,
        "batch_rows": 16,
        "micro_batch_rows": None,
        "peak_lr": 2e-3,
        "warmup_steps": 20,
        "optimizer": "adamw",
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "replay_mixture": "equal",
        "epochs": 1,
        "seed": 0,
    }
    return LineSpec(**(values | changes))


def ledger_of(
    *batches: int, batch_rows: int = 16, epochs: int = 1, replay: float = 0.0
) -> tuple[LedgerEntry, ...]:
    """A ledger of data versions that fill these numbers of batches. From the second on, ``replay`` of the rows are old."""
    return tuple(
        LedgerEntry(
            number=i,
            pack_key=f"pack/p{i}",
            rows=count * batch_rows,
            steps=steps_of(count * batch_rows, batch_rows, epochs, replay if i > 1 else 0.0),
        )
        for i, count in enumerate(batches, start=1)
    )


def plan_context(
    ledger: tuple[LedgerEntry, ...], how: DecaySpec | ParadigmSpec, **changes: Any
) -> PlanContext:
    """The context of a plan for the ledger's last version, with the holdouts as slices.

    ``how`` is a paradigm, or a decay of path switching.
    """
    paradigm = how
    if isinstance(how, DecaySpec):
        paradigm = PathSwitchingSpec(decay=BranchSpec(**how.model_dump()))
    slices = tuple(
        SliceRef(name=holdout_name(e.number), key=f"data/d{e.number}", file=HOLDOUT, data_version=e.number)
        for e in ledger
    )
    values: dict[str, Any] = {
        "line": line_spec(),
        "model": "m",
        "ledger": ledger,
        "trunk_step": 0,
        "paradigm": paradigm,
        "gate": GateSpec(),
        "slices": slices,
        "newest_slice": slices[-1].name,
        "served_number": None,
        "served_export_key": None,
        "served_missing_slices": (),
        "auto_release": True,
        "checkpoint_every": 200,
    }
    return PlanContext(**(values | changes))
