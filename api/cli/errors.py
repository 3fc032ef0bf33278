"""Errors of the command line: what a command prints on stderr instead of a traceback."""

from collections.abc import Sequence


class CliError(Exception):
    """An error to show the user: a title, details or a remedy, and any number of (location, message) pairs."""

    def __init__(self, title: str, detail: str = "", errors: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(title)
        self.title = title
        self.detail = detail
        self.errors = tuple(errors)

    def block(self) -> str:
        """The text for stderr: the title, then indented details."""
        lines = [f"pathswitch: {self.title}"]
        lines += [f"  {line}" for line in self.detail.splitlines()]
        lines += [
            f"  {location}: {message}" if location else f"  {message}" for location, message in self.errors
        ]
        return "\n".join(lines)


def explain(error: Exception) -> CliError | None:
    """Translate an exception for the user; None for a bug, which should show its traceback."""
    if isinstance(error, CliError):
        return error
    # Imported here, so that successful commands do not pay for these imports.
    import httpx
    from pydantic import ValidationError

    from api.client import ApiError
    from service.core.errors import PathswitchError

    if isinstance(error, ApiError):
        problem = error.problem
        errors = [(item.location, item.message) for item in problem.errors or ()]
        return CliError(f"{problem.title} ({problem.status})", problem.detail, errors)
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
        url = str(error.request.url.join("/")) if isinstance(error, httpx.RequestError) else ""
    except RuntimeError:  # the error does not come from a request
        url = ""
    return CliError(
        f"the control plane is not responding{' at ' + url if url else ''}",
        f"{error or type(error).__name__}\n"
        "Start it with `pathswitch up`, or give its URL with --api or PATHSWITCH_API_URL.",
    )


def _invalid(error: Exception) -> CliError:
    """Invalid settings, named by their environment variables, or another invalid model."""
    from pydantic import ValidationError

    assert isinstance(error, ValidationError)
    title = "invalid setting" if error.title == "Settings" else f"invalid {error.title}"
    prefix = "PATHSWITCH_" if error.title == "Settings" else ""
    errors = [
        (prefix + ".".join(str(part) for part in item["loc"]).upper(), item["msg"]) if prefix
        else (".".join(str(part) for part in item["loc"]), item["msg"])
        for item in error.errors(include_url=False)
    ]  # fmt: skip
    return CliError(title, errors=errors)
