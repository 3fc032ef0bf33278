"""How commands reach the control plane."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from api.client import Client


@dataclass(frozen=True)
class Connection:
    """The URL passed with --api, or None for the address in the settings."""

    url: str | None

    def client(self) -> "Client":
        from api.client import Client
        from service.settings import Settings

        if self.url is not None:
            return Client(self.url)
        settings = Settings()
        return Client(url_of(settings.api_host, settings.api_port))


def url_of(host: str, port: int) -> str:
    """URL of a server that listens on this host and port. Wildcard addresses become the loopback address."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{reachable}:{port}"


def client_of(context: typer.Context) -> "Client":
    connection = context.find_object(Connection)
    assert connection is not None
    return connection.client()
