"""The one error tree. The API renders errors as RFC 9457; the orchestrator reads ``retryable``.

PathswitchError
├── InvalidRequest            422  the caller's input is wrong; nothing was stored
│   ├── BadContent            422  a data body is malformed; carries the first errors by line
│   ├── NothingNew            422  every document of the body is already known
│   └── UnsupportedMediaType  415  a data body of a type or encoding that cannot be read
├── NotFound                  404
├── Conflict                  409  the name is taken, or the state does not allow it
├── Unavailable               503  a part of the service is not responding: try again
│   ├── DiskFull              503  a disk of the service is full
│   ├── DatabaseUnavailable   503  the database does not respond; a pending commit may have succeeded
│   └── DatabaseOutdated      503  the database must be migrated before this version of the code can use it
└── StageError                500  a stage could not finish
    ├── Diverged                   the loss or gradient norm is not finite: never retried
    ├── StageInputInvalid          the inputs can never work: never retried
    ├── ArtifactCorrupt            the bytes differ from the manifest
    ├── ArtifactMissing            there is no manifest under that key
    ├── WorkerLost                 the process that ran the stage is gone
    └── Stopped                    asked to stop (cancel, drain)
"""

from collections.abc import Sequence
from typing import NamedTuple


class ErrorItem(NamedTuple):
    """One error inside a request body, e.g. ``("line 7", "no field 'text'")``."""

    location: str
    message: str


class PathswitchError(Exception):
    """Base of the tree. ``code`` is stable and machine-readable, ``detail`` is for people."""

    code = "internal"
    status = 500
    retryable = False

    def __init__(self, detail: str, errors: Sequence[ErrorItem] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = tuple(errors)


class InvalidRequest(PathswitchError):
    code = "invalid_request"
    status = 422


class BadContent(InvalidRequest):
    code = "bad_content"


class NothingNew(InvalidRequest):
    code = "nothing_new"


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    status = 415


class NotFound(PathswitchError):
    code = "not_found"
    status = 404


class Conflict(PathswitchError):
    code = "conflict"
    status = 409


class Unavailable(PathswitchError):
    code = "unavailable"
    status = 503
    retryable = True


class DiskFull(Unavailable):
    """Retrying succeeds once there is disk space again."""


class DatabaseUnavailable(Unavailable):
    """``__cause__`` holds the driver's error, which callers of the API must not see."""

    def __init__(self) -> None:
        super().__init__("the database is not responding")


class DatabaseOutdated(Unavailable):
    """The operator who deploys this version must run ``pathswitch db upgrade``."""

    def __init__(self, revision: str | None, needed: str) -> None:
        at = f"is at revision {revision}" if revision else "has no Pathswitch tables"
        super().__init__(f"the database {at}, and this version needs {needed}: run `pathswitch db upgrade`")


class StageError(PathswitchError):
    code = "stage_failed"
    retryable = True


class Diverged(StageError):
    code = "diverged"
    retryable = False


class StageInputInvalid(StageError):
    code = "stage_input_invalid"
    retryable = False


class ArtifactCorrupt(StageError):
    code = "artifact_corrupt"


class ArtifactMissing(StageError):
    code = "artifact_missing"


class WorkerLost(StageError):
    code = "worker_lost"


class Stopped(StageError):
    code = "stopped"
