"""Converts a stage's exception to the executor port's ``RunError``.

It imports no torch, so that orchestrators and job drivers stay light.
"""

import logging
import traceback

from service.core.errors import PathswitchError, StageError
from service.core.executor import RunError

logger = logging.getLogger(__name__)

TRACEBACK_CHARACTERS = 4000


def describe_failure(stage_id: str, exception: BaseException) -> RunError:
    """Report our own errors by their code, and any other exception as retryable, with its traceback."""
    if isinstance(exception, PathswitchError):
        return RunError(stage_id, exception.code, exception.detail, exception.retryable)
    logger.error("stage %s failed", stage_id, exc_info=exception)
    lines = traceback.format_exception(exception)
    return RunError(stage_id, StageError.code, "".join(lines)[-TRACEBACK_CHARACTERS:], retryable=True)
