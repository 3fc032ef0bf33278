"""How a stage's exception crosses the executor port. Imports no torch: drivers of jobs need it too."""

import logging
import traceback

from service.core.errors import PathswitchError, StageError
from service.core.executor import RunError

logger = logging.getLogger(__name__)


def describe_failure(stage_id: str, exception: BaseException) -> RunError:
    """An exception as the port reports it: our own errors by their code, others as retryable with their traceback."""
    if isinstance(exception, PathswitchError):
        return RunError(stage_id, exception.code, exception.detail, exception.retryable)
    logger.error("stage %s failed", stage_id, exc_info=exception)
    lines = traceback.format_exception(exception)
    return RunError(stage_id, StageError.code, "".join(lines)[-4000:], retryable=True)
