"""Free ports for servers that tests start, found the way ``pathswitch up`` finds them."""

from api.cli.up import ports


def free_ports(count: int) -> list[int]:
    return ports.free_ports("127.0.0.1", count)


def free_port() -> int:
    return free_ports(1)[0]
