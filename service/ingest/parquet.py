"""Parquet bodies: spooled, then read by a child process (``parquet_child.py`` says why)."""

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from service.ingest.documents import FIELDS, DocumentSpool
from service.ingest.findings import Findings, Flaw, Meter, bad_body
from service.ingest.formats import Limits
from service.ingest.parquet_child import END, FRAME, NULL, REFUSED

# A healthy reader gives its first rows within a second or two; only a file made for it keeps it silent
# longer.
STALL_SECONDS = 120

_READ_BYTES = 1 << 18
_CHILD = Path(__file__).with_name("parquet_child.py")


class ParquetParser:
    """One document a row."""

    def __init__(self, spool: DocumentSpool, findings: Findings, limits: Limits, directory: Path) -> None:
        self._spool = spool
        self._findings = findings
        self._limits = limits
        self._meter = Meter(limits)
        self._body: BinaryIO = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115

    def feed(self, piece: bytes) -> None:
        self._body.write(piece)
        self._meter.encoded += len(piece)

    def end(self) -> None:
        if not self._meter.encoded:
            return
        self._body.seek(0)
        command = [sys.executable, "-P", str(_CHILD)]
        command += [str(self._limits.parquet_memory_bytes), str(self._limits.max_document_bytes)]
        with subprocess.Popen(
            command, stdin=self._body, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        ) as child:
            try:
                assert child.stdout is not None
                for number, row in enumerate(self._rows(_Pipe(child.stdout.fileno())), start=1):
                    try:
                        self._add(row)
                    except Flaw as flaw:
                        self._findings.add(f"row {number}", str(flaw))
            finally:
                child.kill()

    def close(self) -> None:
        self._body.close()

    def _add(self, row: list[bytes | None]) -> None:
        if row[0] is None:
            raise Flaw("column 'text' is null")
        fields = {}
        for name, value in zip(FIELDS, row, strict=True):
            if value is None:
                continue
            if len(value) > self._limits.max_document_bytes:
                raise Flaw(f"column '{name}' is longer than {self._limits.max_document_bytes} bytes")
            try:
                fields[name] = value.decode()
            except UnicodeDecodeError as error:
                raise Flaw(f"column '{name}' is not valid UTF-8") from error
        self._spool.add(fields)

    def _rows(self, pipe: "_Pipe") -> Iterator[list[bytes | None]]:
        """The rows that the child writes. Raises BadContent where it refuses the file or does not end."""
        while (lengths := FRAME.unpack(pipe.read(FRAME.size)))[0] != END:
            if lengths[0] == REFUSED:
                raise bad_body(pipe.read(lengths[1]).decode())
            row = [None if length == NULL else pipe.read(length) for length in lengths]
            self._meter.count(FRAME.size + sum(len(value) for value in row if value is not None))
            yield row


class _Pipe:
    """Reads exactly so many bytes. Raises BadContent where they do not come: it crashed, or hangs."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._readable = select.poll()
        self._readable.register(descriptor, select.POLLIN)
        self._held = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._held) < size:
            if not self._readable.poll(STALL_SECONDS * 1000):
                raise bad_body(f"the Parquet file could not be read: no row in {STALL_SECONDS} seconds")
            received = os.read(self._descriptor, _READ_BYTES)
            if not received:
                raise bad_body(
                    "the Parquet file could not be read: it is malformed, or needs too much memory"
                )
            self._held += received
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken
