"""Part two of a plan: the training stages and those after them, written once the last pack has succeeded."""

from typing import Any

from sqlalchemy.orm import Session

from service.core.paradigms import PARADIGMS
from service.core.paradigms.branch_from import plan_branch_from
from service.planning.context import plan_context
from service.planning.stage_rows import write_stages
from service.store import datasets, lines, models
from service.store.tables import Update


def write_training_stages(session: Session, update: Update) -> None:
    """Plan the stages that follow the packs and write them.

    Raises StageInputInvalid if no plan is possible.
    """
    planner = plan_branch_from if update.branch_from else PARADIGMS[update.paradigm["name"]]
    plan = planner(plan_context(session, update))
    write_stages(session, update, plan.stages)
    update.planned = True
    update.branch_point = plan.branch_point
    update.final_step = plan.final_step
    update.notes = plan.notes | _exclusion_notes(session, update)
    session.flush()


def _exclusion_notes(session: Session, update: Update) -> dict[str, Any]:
    """Notes on the excluded data versions that the plan leaves out, and on the rewind of the trunk."""
    number = datasets.version_by_id(session, update.data_version_id).number
    excluded = datasets.excluded_numbers(session, models.by_id(session, update.model_id).dataset_id)
    notes: dict[str, Any] = {}
    if earlier := sorted(version for version in excluded if version < number):
        notes["excluded"] = earlier
    rewound_from = None if update.one_off else lines.rewound_from(session, update.model_id)
    if rewound_from is not None:
        trunk = lines.trunk(session, update.model_id)
        notes["rewound"] = {"from_step": rewound_from, "to_step": trunk.step if trunk else 0}
    return notes
