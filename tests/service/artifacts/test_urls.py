"""The URLs that name an artifact store, and those that the settings make."""

from pathlib import Path

import pytest

from service.artifacts import open_artifacts
from service.settings import Settings


@pytest.mark.parametrize("url", ["ftp://a/b", "s3://bucket/prefix", "s3:///prefix#cache=/tmp", "nothing"])
def test_other_urls_are_rejected(url: str) -> None:
    with pytest.raises(ValueError, match="artifacts URL"):
        open_artifacts(url)


def test_settings_add_the_cache_of_an_object_store(tmp_path: Path) -> None:
    default = Settings(home=tmp_path, artifacts_url="s3://bucket/a/prefix/")
    opened = open_artifacts(default.artifacts)
    assert (opened.root, opened.url) == (
        tmp_path / "cache",
        f"s3://bucket/a/prefix#cache={str(tmp_path / 'cache').replace('/', '%2F')}",
    )
    elsewhere = Settings(home=tmp_path, artifacts_url="s3://bucket", artifacts_cache=tmp_path / "a b#c")
    assert open_artifacts(elsewhere.artifacts).root == tmp_path / "a b#c"


def test_the_url_carries_the_size_limit_of_the_cache(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, artifacts_url="s3://bucket", artifacts_cache_bytes=100)
    assert settings.artifacts.endswith("&max_bytes=100")
    assert open_artifacts(settings.artifacts).url == settings.artifacts
