"""Sample updates as the control plane returns them, for rendering tests."""

from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console, RenderableType

from api.schemas.updates import MetricPoint, Update

START = datetime(2026, 1, 1, tzinfo=UTC)


def rendered(renderable: RenderableType) -> str:
    """Render as on a terminal of 120 columns without colours."""
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def stage_document(name: str, kind: str, state: str, **changes: Any) -> dict[str, Any]:
    started = START if state not in ("pending", "ready") else None
    finished = START + timedelta(seconds=20) if state == "succeeded" else None
    return {
        "id": f"stg_{name}",
        "name": name,
        "kind": kind,
        "state": state,
        "attempt": 1,
        "reused": False,
        "needs": [],
        "progress": None,
        "error": None,
        "started_at": started,
        "finished_at": finished,
    } | changes


def update_document(state: str, *stages: dict[str, Any], **changes: Any) -> Update:
    document = {
        "id": "upd_1",
        "model": "news",
        "data_version": 2,
        "paradigm": {"name": "path_switching"},
        "one_off": False,
        "branch_from": None,
        "state": state,
        "model_version": None,
        "branch_point": 90,
        "final_step": 105,
        "notes": {},
        "error": None,
        "stages": stages,
        "created_at": START,
        "started_at": START,
        "finished_at": None,
    }
    return Update.model_validate(document | changes)


def points(*steps: int, loss: float = 5.0, rate: float = 1e-3) -> list[MetricPoint]:
    return [
        MetricPoint(step=step, loss=loss, learning_rate=rate, grad_norm=1.0, tokens_per_second=5000.0)
        for step in steps
    ]


PROGRESS = {
    "step": 45,
    "total_steps": 90,
    "loss": 5.25,
    "learning_rate": 2e-3,
    "tokens_per_second": 12_345.0,
    "eta_seconds": 75.0,
}
