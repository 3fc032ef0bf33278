"""`pathswitch gc`: what a collection of garbage would remove, by kind, and its removal."""

from api.cli.output import print_rows, size
from service.artifacts import Artifacts
from service.collect_garbage import find_garbage, kinds, remove_garbage
from service.settings import Settings
from service.store.database import Database


def collect(
    settings: Settings, *, delete: bool, older_than_seconds: float, keep_versions: int | None, keys: bool
) -> None:
    """Print what is found, and what was removed. Raises Unavailable."""
    database, artifacts = Database(settings.database), Artifacts.from_url(settings.artifacts)
    try:
        database.check()
        found = find_garbage(
            database, artifacts, older_than_seconds=older_than_seconds, keep_versions=keep_versions
        )
        if delete:
            found = remove_garbage(database, artifacts, found, keep_versions=keep_versions)
    finally:
        database.close()
    if keys:
        print_rows(
            ("key", "why", ">size"), [(item.key, str(item.reason), size(item.bytes)) for item in found]
        )
    if found:
        print_rows(
            ("what", "why", ">artifacts", ">size"),
            [(kind, str(reason), f"{number:,}", size(total)) for reason, kind, number, total in kinds(found)],
        )
    total = size(sum(item.bytes for item in found))
    if delete:
        print(f"removed: {total}")
    elif found:
        print(f"would be removed: {total}. --delete removes it.")
    else:
        print("nothing to remove")
