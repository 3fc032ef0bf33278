"""Content decoders that return bounded pieces, however the input was crafted."""

import zlib
from collections.abc import Iterator
from typing import Protocol

import zstandard

from service.core.errors import BadContent
from service.ingest.formats import ContentEncoding
from service.ingest.validation import body_error

PIECE_BYTES = 1 << 20

# RFC 9659: the largest window that the zstd content coding may require.
MAX_WINDOW_BYTES = 8 << 20

# The library cannot bound its output, so bound its input: a zstd block takes at least 4 bytes and decodes to
# at most 128 KiB, so 1 KiB decodes to at most 32 MiB (measured: exactly that, for a gigabyte of zeros). Text
# decodes no slower in such small slices.
ZSTD_SLICE_BYTES = 1 << 10


class ContentDecoder(Protocol):
    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Decode a chunk into non-empty pieces. Raises BadContent."""
        ...

    def end(self) -> None:
        """Raise BadContent if the encoded body is cut short."""
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
    """Decodes gzip, one member after another (RFC 1952)."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self._ended_members = 0
        self._has_input = False
        self._has_output = False  # of the current member

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        full = False
        while chunk or full:
            if self._member.eof:
                self._member, self._has_output = zlib.decompressobj(wbits=31), False
                self._ended_members += 1
            self._has_input = True
            try:
                piece = self._member.decompress(chunk, PIECE_BYTES)
            except zlib.error as error:
                if self._ended_members and not self._has_output:
                    raise body_error("bytes that are not gzip follow the gzip stream") from error
                raise body_error("the body is not a valid gzip stream") from error
            # After a full piece, zlib may hold more output even though it has consumed all input.
            full = len(piece) == PIECE_BYTES and not self._member.eof
            chunk = self._member.unconsumed_tail or self._member.unused_data
            if piece:
                self._has_output = True
                yield piece

    def end(self) -> None:
        if self._has_input and not self._member.eof:
            raise body_error("the gzip stream is cut short")


class ZstdDecoder:
    """Decodes zstd, one frame after another (RFC 8878), with windows of at most 8 MiB."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame = self._context.decompressobj()
        self._ended_frames = 0
        self._has_input = False
        self._has_output = False  # of the current frame

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        view = memoryview(chunk)
        for start in range(0, len(view), ZSTD_SLICE_BYTES):
            rest: bytes | memoryview = view[start : start + ZSTD_SLICE_BYTES]
            while rest:
                if self._frame.eof:
                    self._frame, self._has_output = self._context.decompressobj(), False
                    self._ended_frames += 1
                self._has_input = True
                try:
                    piece = self._frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise self._content_error(str(error)) from error
                rest = self._frame.unused_data
                if piece:
                    self._has_output = True
                    yield from IdentityDecoder().feed(piece)

    def end(self) -> None:
        if self._has_input and not self._frame.eof:
            raise body_error("the zstd stream is cut short")

    def _content_error(self, reason: str) -> BadContent:
        if "too much memory" in reason:
            return body_error(f"the zstd stream needs a window larger than {MAX_WINDOW_BYTES} bytes")
        if self._ended_frames and not self._has_output:
            return body_error("bytes that are not zstd follow the zstd stream")
        return body_error("the body is not a valid zstd stream")


def decoder(encoding: ContentEncoding | None) -> ContentDecoder:
    match encoding:
        case None:
            return IdentityDecoder()
        case ContentEncoding.GZIP:
            return GzipDecoder()
        case ContentEncoding.ZSTD:
            return ZstdDecoder()
