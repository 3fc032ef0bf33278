import pytest
from pydantic import ValidationError

from service.core.serving import EngineName
from service.settings import Settings


def test_the_engine_is_chosen_by_itself_and_has_its_own_defaults_unless_they_are_set() -> None:
    assert Settings().engine is EngineName.AUTO
    assert Settings().engine_options == {}


def test_what_is_set_of_the_engine_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_an_engine_that_cannot_be_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PATHSWITCH_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()
