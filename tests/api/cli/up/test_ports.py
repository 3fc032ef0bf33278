"""Ports that are free, and words about those that are not."""

import socket

import pytest

from api.cli.errors import CliError
from api.cli.up import ports


def test_free_ports_differ_and_are_free() -> None:
    found = ports.free_ports("127.0.0.1", 20)
    assert len(set(found)) == 20
    assert all(ports.is_free("127.0.0.1", port) for port in found)


def test_free_ports_are_none_that_the_kernel_gives_to_connections() -> None:
    first = int(ports.EPHEMERAL.read_text().split()[0])
    assert all(ports.FIRST <= port < first for port in ports.free_ports("127.0.0.1", 100))


def test_a_port_in_use_is_named_with_the_flag_that_changes_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(CliError) as caught:
            ports.chosen("control plane", "127.0.0.1", port, "--api-port", "PATHSWITCH_API_PORT")
    assert f"port {port} of 127.0.0.1, where the control plane should listen" in caught.value.title
    assert "--api-port" in caught.value.detail
    assert ports.chosen("control plane", "127.0.0.1", port, "--api-port", "PATHSWITCH_API_PORT") == port


def test_zero_means_any() -> None:
    assert ports.chosen("control plane", "127.0.0.1", 0, "", "") > 0


def test_a_host_that_is_not_of_this_machine_is_a_problem() -> None:
    with pytest.raises(CliError, match="cannot listen on"):
        ports.chosen("control plane", "203.0.113.1", 0, "", "")
