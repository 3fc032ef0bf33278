"""Finds free ports, and explains why a port cannot be used."""

import errno
import random
import socket
from pathlib import Path

from api.cli.errors import CliError

FIRST = 15_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_EPHEMERAL = 32_768  # Linux's default; other systems start higher


def free_ports(host: str, count: int) -> list[int]:
    """Distinct ports that nothing is bound to, below the kernel's ephemeral range. Raises OSError.

    The kernel could give an ephemeral port to a connection before the caller binds it, which a Ray head does
    only seconds later.
    """
    candidates = range(FIRST, max(_first_ephemeral(), FIRST + 1_000))
    found: list[int] = []
    for port in random.sample(candidates, len(candidates)):
        if is_free(host, port):
            found.append(port)
            if len(found) == count:
                return found
    raise OSError(errno.EADDRINUSE, f"fewer than {count} ports above {FIRST} are free")


def _first_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except OSError:
        return _USUAL_EPHEMERAL


def is_free(host: str, port: int) -> bool:
    """Whether a server can bind to the port. Lingering connections of an earlier server do not matter."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        return True


def usable_port(what: str, host: str, port: int, flag: str, variable: str) -> int:
    """Return ``port``, or a free port if it is 0. Raises CliError if the port cannot be used."""
    try:
        if port == 0:
            return free_ports(host, 1)[0]
        if is_free(host, port):
            return port
    except OSError as error:
        raise CliError(f"the {what} cannot listen on {host}: {error.strerror or error}") from error
    raise CliError(
        f"port {port} on {host}, meant for the {what}, is in use by another program",
        f"Choose another port with {flag} or {variable} (0 picks a free one), or stop that program.",
    )
