"""Ports: one that is free, or a clear word about one that is not."""

import errno
import random
import socket
from pathlib import Path

from api.cli.errors import CliError

FIRST = 15_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_EPHEMERAL = 32_768  # Linux's default; other systems begin higher


def free_ports(host: str, count: int) -> list[int]:
    """Distinct ports that nothing is bound to now, none of those that the kernel deals out: whoever binds one seconds later
    (the last part of a Ray head does) would else find it given to a connection meanwhile. Raises OSError.
    """
    candidates = range(FIRST, max(_first_ephemeral(), FIRST + 1_000))
    found: list[int] = []
    for port in random.sample(candidates, len(candidates)):
        if is_free(host, port):
            found.append(port)
            if len(found) == count:
                return found
    raise OSError(errno.EADDRINUSE, f"fewer than {count} ports from {FIRST} on are free")


def _first_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except OSError:
        return _USUAL_EPHEMERAL


def is_free(host: str, port: int) -> bool:
    """Whether a server could bind there. Lingering connections of an ended one do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        return True


def chosen(what: str, host: str, port: int, flag: str, variable: str) -> int:
    """The port to use: the one asked for, or a free one for 0. Raises CliError where it cannot be had."""
    try:
        if port == 0:
            return free_ports(host, 1)[0]
        if is_free(host, port):
            return port
    except OSError as error:
        raise CliError(f"the {what} cannot listen on {host}: {error.strerror or error}") from error
    raise CliError(
        f"port {port} of {host}, where the {what} should listen, is in use by another program",
        f"Choose another with {flag} or {variable} (0: any free one), or stop that program.",
    )
