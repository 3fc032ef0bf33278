"""Settings from the environment. Each process reads them once, at its start, and nothing else reads the environment."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, computed_field
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.artifacts.s3 import s3_url
from service.core.serving import EngineName
from service.ingest.formats import Limits

# Not settings: `pathswitch up` sets these for the orchestrator. The file to create when serving answers:
READY_FILE_VARIABLE = "PATHSWITCH_READY_FILE"
# Set to any value if the parent process ends the Ray cluster once the orchestrator has ended:
RAY_ENDS_VARIABLE = "PATHSWITCH_RAY_ENDS"


class Settings(BaseSettings):
    """Everything an operator sets, each as ``PATHSWITCH_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="PATHSWITCH_", frozen=True)

    home: Path = Path(".pathswitch")
    database_url: str | None = None
    artifacts_url: str | None = None
    # For an object store: the folder for local copies (default: <home>/cache), and how many bytes of them to keep (all).
    artifacts_cache: Path | None = None
    artifacts_cache_bytes: int | None = Field(None, ge=0)
    ray_address: str | None = None
    api_host: str = "127.0.0.1"
    api_port: int = Field(8080, ge=0, le=65535)
    serve_host: str = "127.0.0.1"
    serve_port: int = Field(8000, ge=0, le=65535)
    executor: Literal["ray", "local"] = "ray"
    local_processes: int = Field(1, ge=1, le=1024)  # the local executor runs this many stages side by side
    engine: EngineName = EngineName.AUTO
    # Overrides of the engine's own defaults.
    engine_max_slots: int | None = Field(None, ge=1, le=65536)
    engine_kv_cache_bytes: int | None = Field(None, ge=1)
    engine_max_waiting: int | None = Field(None, ge=1)
    import_roots: tuple[Path, ...] = ()
    max_line_bytes: int = Field(Limits.max_line_bytes, ge=1)
    max_document_bytes: int = Field(Limits.max_document_bytes, ge=1)
    max_decoded_bytes: int = Field(Limits.max_decoded_bytes, ge=1)
    lease_seconds: float = Field(15.0, gt=0)
    tick_seconds: float = Field(0.5, gt=0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def database(self) -> str:
        """URL of the database: ``database_url``, or a SQLite file in the home."""
        return self.database_url or f"sqlite:///{self.home.absolute() / 'pathswitch.db'}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def artifacts(self) -> str:
        """URL of the artifact store: ``artifacts_url``, or a folder in the home. An S3 URL names its cache folder too."""
        url = self.artifacts_url or (self.home.absolute() / "artifacts").as_uri()
        if not url.startswith("s3://") or "#" in url:
            return url
        cache = (self.artifacts_cache or self.home / "cache").absolute()
        return s3_url(url, cache, self.artifacts_cache_bytes)

    @property
    def engine_options(self) -> dict[str, int | str]:
        """The engine to use and its options, as far as they are set."""
        options = {
            "engine": None if self.engine is EngineName.AUTO else str(self.engine),
            "max_slots": self.engine_max_slots,
            "kv_cache_bytes": self.engine_kv_cache_bytes,
            "max_waiting": self.engine_max_waiting,
        }
        return {name: value for name, value in options.items() if value is not None}

    def environment(self) -> dict[str, str]:
        """The environment for child processes: this process's own, with these settings."""
        values = {
            name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None
        }
        variables = {
            f"PATHSWITCH_{name.upper()}": _to_text(value) for name, value in values.items() if value != ()
        }
        return os.environ | variables


def _to_text(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return str(value)
