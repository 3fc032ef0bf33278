"""Content encodings, undone piece by piece: no input decodes to much at once, however made."""

import zlib
from collections.abc import Iterator
from typing import Protocol

import zstandard

from service.core.errors import BadContent
from service.ingest.findings import bad_body
from service.ingest.formats import ContentEncoding

PIECE_BYTES = 1 << 20

# RFC 9659: the largest window that a zstd content coding may ask for.
MAX_WINDOW_BYTES = 8 << 20

# A zstd block takes at least 4 bytes and gives at most 128 KiB, so that 1 KiB of input gives at most 32 MiB
# (measured: exactly that, for a gigabyte of zeros); the library has no other bound. Text is no slower for it.
ZSTD_SLICE_BYTES = 1 << 10


class Decoder(Protocol):
    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Decode a chunk; gives pieces, none empty. Raises BadContent."""
        ...

    def end(self) -> None:
        """Raise BadContent where the encoded body is cut short."""
        ...


class IdentityDecoder:
    def feed(self, chunk: bytes) -> Iterator[bytes]:
        if len(chunk) <= PIECE_BYTES:
            if chunk:
                yield chunk
            return
        for start in range(0, len(chunk), PIECE_BYTES):
            yield chunk[start : start + PIECE_BYTES]

    def end(self) -> None:
        return


class GzipDecoder:
    """gzip, one member after another (RFC 1952)."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self._members = 0
        self._pending = False  # the member has begun
        self._decoded = False  # the member has given bytes

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        full = False
        while chunk or full:
            if self._member.eof:
                self._member, self._decoded = zlib.decompressobj(wbits=31), False
                self._members += 1
            self._pending = True
            try:
                piece = self._member.decompress(chunk, PIECE_BYTES)
            except zlib.error as error:
                if self._members and not self._decoded:
                    raise bad_body("bytes that are not gzip follow the gzip stream") from error
                raise bad_body("the body is not a valid gzip stream") from error
            # A full piece may leave output inside zlib although all input is consumed.
            full = len(piece) == PIECE_BYTES and not self._member.eof
            chunk = self._member.unconsumed_tail or self._member.unused_data
            if piece:
                self._decoded = True
                yield piece

    def end(self) -> None:
        if self._pending and not self._member.eof:
            raise bad_body("the gzip stream is cut short")


class ZstdDecoder:
    """zstd, one frame after another (RFC 8878), with windows of at most 8 MiB."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame = self._context.decompressobj()
        self._frames = 0
        self._pending = False
        self._decoded = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        view = memoryview(chunk)
        for start in range(0, len(view), ZSTD_SLICE_BYTES):
            rest: bytes | memoryview = view[start : start + ZSTD_SLICE_BYTES]
            while rest:
                if self._frame.eof:
                    self._frame, self._decoded = self._context.decompressobj(), False
                    self._frames += 1
                self._pending = True
                try:
                    piece = self._frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise self._bad(str(error)) from error
                rest = self._frame.unused_data
                if piece:
                    self._decoded = True
                    yield from IdentityDecoder().feed(piece)

    def end(self) -> None:
        if self._pending and not self._frame.eof:
            raise bad_body("the zstd stream is cut short")

    def _bad(self, reason: str) -> BadContent:
        if "too much memory" in reason:
            return bad_body(f"the zstd stream asks for a window over {MAX_WINDOW_BYTES} bytes")
        if self._frames and not self._decoded:
            return bad_body("bytes that are not zstd follow the zstd stream")
        return bad_body("the body is not a valid zstd stream")


def decoder(encoding: ContentEncoding | None) -> Decoder:
    match encoding:
        case None:
            return IdentityDecoder()
        case ContentEncoding.GZIP:
            return GzipDecoder()
        case ContentEncoding.ZSTD:
            return ZstdDecoder()
