"""PARADIGMS: name -> the pure function that turns a plan's context into the stages of one update.

A new paradigm is one file here, one line in this table, and one golden plan in ``tests/golden``.
"""

from collections.abc import Callable, Mapping

from service.core.paradigms.continual import plan_continual
from service.core.paradigms.from_scratch import plan_from_scratch
from service.core.paradigms.merge import plan_merge
from service.core.paradigms.path_switching import plan_path_switching
from service.core.paradigms.wsd_s import plan_wsd_s
from service.core.plan import Plan, PlanContext

PARADIGMS: Mapping[str, Callable[[PlanContext], Plan]] = {
    "path_switching": plan_path_switching,
    "from_scratch": plan_from_scratch,
    "continual": plan_continual,
    "wsd_s": plan_wsd_s,
    "merge": plan_merge,
}
