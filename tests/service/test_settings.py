"""The engine settings: defaults, environment variables, and rejected values."""

import pytest
from pydantic import ValidationError

from service.core.serving import EngineName
from service.settings import Settings


def test_by_default_the_engine_is_chosen_automatically_with_its_own_options() -> None:
    assert Settings().engine is EngineName.AUTO
    assert Settings().engine_options == {}


def test_engine_settings_become_engine_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHSWITCH_ENGINE", "vllm")
    monkeypatch.setenv("PATHSWITCH_ENGINE_MAX_SLOTS", "64")
    monkeypatch.setenv("PATHSWITCH_ENGINE_KV_CACHE_BYTES", str(1 << 33))
    monkeypatch.setenv("PATHSWITCH_ENGINE_MAX_WAITING", "8")
    options = {"engine": "vllm", "max_slots": 64, "kv_cache_bytes": 1 << 33, "max_waiting": 8}
    settings = Settings()
    assert settings.engine_options == options
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


@pytest.mark.parametrize(
    ("name", "value"), [("ENGINE", "tgi"), ("ENGINE_MAX_SLOTS", "0"), ("ENGINE_KV_CACHE_BYTES", "4G")]
)
def test_invalid_engine_settings_are_rejected(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PATHSWITCH_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()
