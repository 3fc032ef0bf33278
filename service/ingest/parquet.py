"""Parquet bodies: spooled to disk, then read by a child process (``parquet_child.py`` explains why)."""

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from service.ingest.documents import FIELDS, DocumentSpool
from service.ingest.formats import Limits
from service.ingest.parquet_child import END, FRAME, NULL, REJECTED
from service.ingest.validation import ExpansionMeter, RowError, RowErrors, body_error

# A healthy reader returns its first rows within a second or two. Only a crafted file keeps it silent longer.
STALL_SECONDS = 120

_READ_BYTES = 1 << 18
_CHILD = Path(__file__).with_name("parquet_child.py")


class ParquetParser:
    """Parses one document per row."""

    def __init__(self, spool: DocumentSpool, errors: RowErrors, limits: Limits, directory: Path) -> None:
        self._spool = spool
        self._errors = errors
        self._limits = limits
        self._meter = ExpansionMeter(limits)
        self._body: BinaryIO = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115

    def feed(self, piece: bytes) -> None:
        self._body.write(piece)
        self._meter.add_encoded(len(piece))

    def end(self) -> None:
        if not self._meter.encoded_bytes:
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
                    except RowError as error:
                        self._errors.add(f"row {number}", str(error))
            finally:
                child.kill()

    def close(self) -> None:
        self._body.close()

    def _add(self, row: list[bytes | None]) -> None:
        if row[0] is None:
            raise RowError("column 'text' is null")
        fields = {}
        for name, value in zip(FIELDS, row, strict=True):
            if value is None:
                continue
            if len(value) > self._limits.max_document_bytes:
                raise RowError(f"column '{name}' is longer than {self._limits.max_document_bytes} bytes")
            try:
                fields[name] = value.decode()
            except UnicodeDecodeError as error:
                raise RowError(f"column '{name}' is not valid UTF-8") from error
        self._spool.add(fields)

    def _rows(self, pipe: "_Pipe") -> Iterator[list[bytes | None]]:
        """Rows from the child. Raises BadContent if it rejects the file, dies, or hangs."""
        while (lengths := FRAME.unpack(pipe.read(FRAME.size)))[0] != END:
            if lengths[0] == REJECTED:
                raise body_error(pipe.read(lengths[1]).decode())
            row = [None if length == NULL else pipe.read(length) for length in lengths]
            self._meter.add_decoded(FRAME.size + sum(len(value) for value in row if value is not None))
            yield row


class _Pipe:
    """Reads exactly as many bytes as asked. Raises BadContent if the child dies or hangs before that."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._buffer = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            if not self._poll.poll(STALL_SECONDS * 1000):
                raise body_error(f"the Parquet file could not be read: no row in {STALL_SECONDS} seconds")
            received = os.read(self._descriptor, _READ_BYTES)
            if not received:
                raise body_error(
                    "the Parquet file could not be read: it is malformed, or needs too much memory"
                )
            self._buffer += received
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        return content
