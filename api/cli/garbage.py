"""``pathswitch gc``: show what garbage collection would remove, by kind, and remove it on request."""

from api.cli.output import print_rows, size
from service.artifacts import open_artifacts
from service.artifacts.garbage import find_garbage, remove_garbage, summarize
from service.settings import Settings
from service.store.database import Database


def collect(
    settings: Settings, *, delete: bool, older_than_seconds: float, keep_versions: int | None, keys: bool
) -> None:
    """Print the garbage, or what was removed if ``delete``. ``keys`` lists it one by one. Raises Unavailable."""
    database, artifacts = Database(settings.database), open_artifacts(settings.artifacts)
    try:
        database.check()
        garbage = find_garbage(
            database, artifacts, older_than_seconds=older_than_seconds, keep_versions=keep_versions
        )
        if delete:
            garbage = remove_garbage(database, artifacts, garbage, keep_versions=keep_versions)
    finally:
        database.close()
    if keys:
        print_rows(
            ("key", "why", ">size"), [(item.key, str(item.reason), size(item.bytes)) for item in garbage]
        )
    if garbage:
        groups = summarize(garbage)
        print_rows(
            ("what", "why", ">artifacts", ">size"),
            [(kind, str(reason), f"{count:,}", size(total)) for reason, kind, count, total in groups],
        )
    total = size(sum(item.bytes for item in garbage))
    if delete:
        print(f"removed: {total}")
    elif garbage:
        print(f"would be removed: {total}. --delete removes it.")
    else:
        print("nothing to remove")
