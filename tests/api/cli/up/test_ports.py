"""Free ports, and errors about ports that cannot be used."""

import socket

import pytest

from api.cli.errors import CliError
from api.cli.up import ports


def test_free_ports_differ_and_are_free() -> None:
    found = ports.free_ports("127.0.0.1", 20)
    assert len(set(found)) == 20
    assert all(ports.is_free("127.0.0.1", port) for port in found)


def test_free_ports_are_outside_the_ephemeral_range() -> None:
    first = int(ports.EPHEMERAL.read_text().split()[0])
    assert all(ports.FIRST <= port < first for port in ports.free_ports("127.0.0.1", 100))


def test_a_port_in_use_is_reported_with_the_flag_that_changes_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(CliError) as caught:
            ports.usable_port("control plane", "127.0.0.1", port, "--api-port", "PATHSWITCH_API_PORT")
    assert f"port {port} on 127.0.0.1, meant for the control plane" in caught.value.title
    assert "--api-port" in caught.value.detail
    assert ports.usable_port("control plane", "127.0.0.1", port, "--api-port", "PATHSWITCH_API_PORT") == port


def test_zero_picks_a_free_port() -> None:
    assert ports.usable_port("control plane", "127.0.0.1", 0, "", "") > 0


def test_a_host_of_another_machine_is_an_error() -> None:
    with pytest.raises(CliError, match="cannot listen on"):
        ports.usable_port("control plane", "203.0.113.1", 0, "", "")
