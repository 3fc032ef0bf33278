"""A cheap client for load tests: minimal HTTP/1.1 over persistent connections, on one event loop."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from api.schemas.common import BASE

NDJSON = "application/x-ndjson"


class Connection:
    def __init__(self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._host = host
        self._reader = reader
        self._writer = writer

    async def request(
        self, method: str, path: str, body: bytes = b"", media_type: str = NDJSON
    ) -> tuple[int, bytes]:
        """Send a request; status and body of the response, which must have a Content-Length."""
        self._writer.write(self.head(method, path, len(body), media_type) + body)
        return await self.answer()

    async def answer(self) -> tuple[int, bytes]:
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        _, found, rest = head.partition(b"\r\ncontent-length:")
        assert found, head
        return int(head[9:12]), await self._reader.readexactly(int(rest.partition(b"\r")[0]))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def head(self, method: str, path: str, length: int, media_type: str = NDJSON) -> bytes:
        lines = (
            f"{method} {BASE}{path} HTTP/1.1",
            f"Host: {self._host}",
            f"Content-Type: {media_type}",
            f"Content-Length: {length}",
        )
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Connection]:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 22)
    try:
        yield Connection(address.netloc, reader, writer)
    finally:
        writer.close()


async def get(url: str, path: str) -> Any:
    async with connection(url) as http:
        status, body = await http.request("GET", path)
    assert status == 200, body
    return json.loads(body)


async def post(url: str, path: str, document: dict[str, Any]) -> Any:
    async with connection(url) as http:
        status, body = await http.request("POST", path, json.dumps(document).encode(), "application/json")
    assert status < 300, body
    return json.loads(body)


@dataclass
class Load:
    """Results of a load. ``client_cpu_seconds`` is the CPU time of this process, the client."""

    seconds: float = 0.0
    client_cpu_seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def client_ms(self) -> float:
        return self.client_cpu_seconds / len(self.latencies) * 1000

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000


Request = tuple[str, str, bytes]


async def load(url: str, num_clients: int, seconds: float, request: Callable[[int], Request]) -> Load:
    """Send ``request(0)``, ``request(1)``, … from several clients, each waiting for its response."""
    result = Load()
    number = 0

    async def client() -> None:
        nonlocal number
        async with connection(url) as http:
            while time.perf_counter() < deadline:
                current, number = number, number + 1
                method, path, body = request(current)
                start = time.perf_counter()
                status, _ = await http.request(method, path, body)
                result.latencies.append(time.perf_counter() - start)
                result.statuses[status] = result.statuses.get(status, 0) + 1

    cpu, began = time.process_time(), time.perf_counter()
    deadline = began + seconds
    await asyncio.gather(*(client() for _ in range(num_clients)))
    result.seconds = time.perf_counter() - began
    result.client_cpu_seconds = time.process_time() - cpu
    return result
