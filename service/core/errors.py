"""The one error tree. The API renders it as RFC 9457; the orchestrator reads ``retryable``.

PathswitchError
├── InvalidRequest            422  the caller's input is wrong; nothing was stored
│   ├── BadContent            422  a data body is malformed; carries the first errors by line
│   ├── NothingNew            422  every document of the body is already known
│   └── UnsupportedMediaType  415  a data body of a type or encoding that cannot be read
├── NotFound                  404
├── Conflict                  409  the name is taken, or the state does not allow it
├── Unavailable               503  a part of the service does not answer yet; come back
│   ├── DiskFull              503  a disk of the service is full
│   ├── DatabaseAway          503  whether a commit that was under way was carried out, only rows can tell
│   └── DatabaseBehind        503  the database lacks what this version of the code relies on, until it is migrated
└── StageError                500  a stage could not finish
    ├── Diverged                   loss or gradient norm not finite: never retried
    ├── StageInputInvalid          the inputs can never work: never retried
    ├── ArtifactCorrupt            bytes differ from the manifest
    ├── ArtifactMissing            no manifest under that key
    ├── WorkerLost                 the process that ran the stage is gone
    └── Stopped                    asked to stop (cancel, drain)
"""

from collections.abc import Sequence
from typing import NamedTuple


class ErrorItem(NamedTuple):
    """One finding inside a request body, e.g. ``("line 7", "no field 'text'")``."""

    location: str
    message: str


class PathswitchError(Exception):
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


class DatabaseAway(Unavailable):
    """Its cause says what the driver said, which is not for callers."""

    def __init__(self) -> None:
        super().__init__("the database does not answer")


class DatabaseBehind(Unavailable):
    """``pathswitch db upgrade`` brings it there, by whoever rolls this version out."""

    def __init__(self, revision: str | None, needed: str) -> None:
        at = f"is at revision {revision}" if revision else "has no tables of ours"
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
