"""Ports: one that is free, or a clear word about one that is not."""

import errno
import socket

from api.cli.problems import Problem


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nothing is bound to now. They are distinct: all are held until the last is found."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((host, 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


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
    """The port to use: the one asked for, or a free one for 0. Raises Problem where it cannot be had."""
    try:
        if port == 0:
            return free_ports(host, 1)[0]
        if is_free(host, port):
            return port
    except OSError as error:
        raise Problem(f"the {what} cannot listen on {host}: {error.strerror or error}") from error
    raise Problem(
        f"port {port} of {host}, where the {what} should listen, is in use by another program",
        f"Choose another with {flag} or {variable} (0: any free one), or stop that program.",
    )
