"""What went wrong, in one readable block on stderr, for the person at the terminal."""

from collections.abc import Sequence


class CliError(Exception):
    """What is wrong, what is known or can be done about it, and where there are several findings, each."""

    def __init__(self, title: str, detail: str = "", errors: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(title)
        self.title = title
        self.detail = detail
        self.errors = tuple(errors)

    def block(self) -> str:
        lines = [f"pathswitch: {self.title}"]
        lines += [f"  {line}" for line in self.detail.splitlines()]
        lines += [
            f"  {location}: {message}" if location else f"  {message}" for location, message in self.errors
        ]
        return "\n".join(lines)


def explain(error: Exception) -> CliError | None:
    """The error as a problem; None where it is a defect of ours, which deserves its traceback."""
    if isinstance(error, CliError):
        return error
    # Here, so that a command that goes well does not pay for what it never used.
    import httpx
    from pydantic import ValidationError

    from api.client import ApiError
    from service.core.errors import PathswitchError

    if isinstance(error, ApiError):
        problem = error.problem
        findings = [(item.location, item.message) for item in problem.errors or ()]
        return CliError(f"{problem.title} ({problem.status})", problem.detail, findings)
    if isinstance(error, httpx.TransportError):
        return _unreachable(error)
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, PathswitchError):
        return CliError(error.detail, errors=error.errors)
    if isinstance(error, OSError) and error.filename is not None:
        return CliError(f"{error.filename}: {error.strerror}")
    return None


def _unreachable(error: Exception) -> CliError:
    import httpx

    try:
        where = str(error.request.url.join("/")) if isinstance(error, httpx.RequestError) else ""
    except RuntimeError:  # it was not raised by a request
        where = ""
    return CliError(
        f"the control plane does not answer{' at ' + where if where else ''}",
        f"{error or type(error).__name__}\n"
        "Start it with `pathswitch up`, or say where it is with --api or PATHSWITCH_API_URL.",
    )


def _invalid(error: Exception) -> CliError:
    """Settings that cannot be: everything else that is validated here was made here."""
    from pydantic import ValidationError

    assert isinstance(error, ValidationError)
    what = "a setting is not valid" if error.title == "Settings" else f"not a valid {error.title}"
    prefix = "PATHSWITCH_" if error.title == "Settings" else ""
    findings = [
        (prefix + ".".join(str(part) for part in item["loc"]).upper(), item["msg"]) if prefix
        else (".".join(str(part) for part in item["loc"]), item["msg"])
        for item in error.errors(include_url=False)
    ]  # fmt: skip
    return CliError(what, errors=findings)
