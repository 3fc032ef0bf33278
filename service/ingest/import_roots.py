"""Import roots: the only folders whose files a request may name."""

from collections.abc import Sequence
from pathlib import Path


def resolve_under_roots(path: str, import_roots: Sequence[Path]) -> Path | None:
    """Resolve a path, links included. Returns None if it does not exist under an import root.

    A caller's error must not reveal whether a path outside the roots exists.
    """
    try:
        resolved = Path(path).resolve(strict=True)
        roots = [root.resolve() for root in import_roots]
    except (OSError, ValueError, RuntimeError):  # missing, NUL in the name, circular links
        return None
    return resolved if any(resolved.is_relative_to(root) for root in roots) else None
