"""The environment, read once, by whoever starts a process. No other function reads it."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, computed_field
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.artifacts.s3 import s3_url
from service.core.serving import EngineName

MIB = 1 << 20
GIB = 1 << 30


class Settings(BaseSettings):
    """Everything that an operator sets, as ``PATHSWITCH_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="PATHSWITCH_", frozen=True)

    home: Path = Path(".pathswitch")
    database_url: str | None = None
    artifacts_url: str | None = None
    # Of an object store: where files are copied to (by default in the home), and how many bytes of them stay (all).
    artifacts_cache: Path | None = None
    artifacts_cache_bytes: int | None = Field(None, ge=0)
    ray_address: str | None = None
    api_host: str = "127.0.0.1"
    api_port: int = Field(8080, ge=0, le=65535)
    serve_host: str = "127.0.0.1"
    serve_port: int = Field(8000, ge=0, le=65535)
    executor: Literal["ray", "local"] = "ray"
    local_processes: int = Field(1, ge=1, le=1024)  # of the local executor: stages that run side by side
    engine: EngineName = EngineName.AUTO
    # Of an engine, where they are not its own default.
    engine_max_slots: int | None = Field(None, ge=1, le=65536)
    engine_kv_cache_bytes: int | None = Field(None, ge=1)
    engine_max_waiting: int | None = Field(None, ge=1)
    import_roots: tuple[Path, ...] = ()
    max_line_bytes: int = Field(64 * MIB, ge=1)
    max_document_bytes: int = Field(64 * MIB, ge=1)
    max_decoded_bytes: int = Field(256 * GIB, ge=1)
    lease_seconds: float = Field(15.0, gt=0)
    tick_seconds: float = Field(0.5, gt=0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def database(self) -> str:
        """URL of the database: the one that is set, or a SQLite file in the home."""
        return self.database_url or f"sqlite:///{self.home.absolute() / 'pathswitch.db'}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def artifacts(self) -> str:
        """URL of the artifact store: the one that is set, or a folder in the home. An object store's has its cache in it."""
        url = self.artifacts_url or (self.home.absolute() / "artifacts").as_uri()
        if not url.startswith("s3://") or "#" in url:
            return url
        cache = (self.artifacts_cache or self.home / "cache").absolute()
        return s3_url(url, cache, self.artifacts_cache_bytes)

    @property
    def engine_options(self) -> dict[str, int | str]:
        """What engines are given: which it is, and what of its options is set."""
        options = {
            "engine": None if self.engine is EngineName.AUTO else str(self.engine),
            "max_slots": self.engine_max_slots,
            "kv_cache_bytes": self.engine_kv_cache_bytes,
            "max_waiting": self.engine_max_waiting,
        }
        return {name: value for name, value in options.items() if value is not None}

    def environment(self) -> dict[str, str]:
        """This process's environment with these settings in it: what child processes are started with."""
        values = {
            name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None
        }
        written = {
            f"PATHSWITCH_{name.upper()}": _written(value) for name, value in values.items() if value != ()
        }
        return os.environ | written


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return str(value)
