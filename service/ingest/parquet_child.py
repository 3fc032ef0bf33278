"""Reads a Parquet file for ``parquet.py`` in a child process with little memory.

A Parquet file declares the sizes of its pages, which cannot be verified without decoding them; a page of a
few bytes may expand to a million rows of a megabyte; and malformed files have crashed the library. So the
file, this process's standard input, is read where the kernel limits memory and where a crash is only an exit
status.

Run as ``python parquet_child.py MEMORY_BYTES MAX_VALUE_BYTES``. Standard output is a sequence of frames:
four 32-bit lengths, with -1 for a null, then the bytes of ``text``, ``id``, ``date`` and ``source`` of one
row. A value longer than MAX_VALUE_BYTES is cut one byte after that. A first length of -2 announces a
message, of the second length, that says why the file is rejected; -3 ends the rows. This module imports
nothing of the project.
"""

import os
import struct
import sys
from typing import Any, BinaryIO

FIELDS = ("text", "id", "date", "source")
FRAME = struct.Struct("<4i")
NULL, REJECTED, END = -1, -2, -3

# Batches of 16 rows take 5 µs per row of 2 KB, and 128 MiB of memory if every row is 8 MiB.
BATCH_ROWS = 16
FLUSH_BYTES = 1 << 18


class RejectedFile(Exception):
    """The file cannot be read. The message says why."""


def main() -> None:
    memory_bytes, max_value_bytes = int(sys.argv[1]), int(sys.argv[2])
    output = os.fdopen(1, "wb", buffering=FLUSH_BYTES)
    # Must be set before the import. The other allocators reserve address space far ahead.
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    os.environ["OMP_NUM_THREADS"] = "1"
    import pyarrow
    import pyarrow.parquet  # loaded before the limit, which then need not cover its libraries

    pyarrow.set_io_thread_count(1)
    limit_memory(memory_bytes)
    try:
        write_rows(output, max_value_bytes)
        output.write(FRAME.pack(END, 0, 0, 0))
    except RejectedFile as error:
        reject(output, str(error))
    except MemoryError:  # pyarrow's own is a subclass
        reject(
            output,
            f"the Parquet file needs more than {memory_bytes} bytes of memory to read; write smaller pages",
        )
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reject(output, f"not a readable Parquet file: {' '.join(str(error).split())[:300]}")
    output.flush()
    os._exit(0)  # skip the teardown of a library that a malformed file may have damaged


def limit_memory(memory_bytes: int) -> None:
    """Let this process map ``memory_bytes`` more than it has now. Does nothing outside Linux."""
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def reject(output: BinaryIO, message: str) -> None:
    encoded = message.encode("utf-8", "replace")
    output.write(FRAME.pack(REJECTED, len(encoded), 0, 0) + encoded)


def write_rows(output: BinaryIO, max_value_bytes: int) -> None:
    import pyarrow
    from pyarrow import parquet

    with open(0, "rb", buffering=0) as source:
        file = parquet.ParquetFile(
            pyarrow.PythonFile(source, "r"),
            buffer_size=1 << 20,
            pre_buffer=False,
            arrow_extensions_enabled=False,
        )
        names = columns(file.schema_arrow)
        rows = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
            values = [
                as_bytes(batch.column(name)) if name in names else [None] * len(batch) for name in FIELDS
            ]
            for row in zip(*values, strict=True):
                cut = [None if value is None else value[: max_value_bytes + 1] for value in row]
                output.write(FRAME.pack(*(NULL if value is None else len(value) for value in cut)))
                output.write(b"".join(value for value in cut if value))
            rows += len(batch)
        if rows != file.metadata.num_rows:
            raise RejectedFile(
                f"the Parquet file has {rows} rows, but its footer says {file.metadata.num_rows}"
            )


def columns(schema: Any) -> list[str]:
    """The columns to read. Raises RejectedFile if there is no text column, or one has an unusable type."""
    import pyarrow.types as types

    names = [name for name in FIELDS if name in schema.names]
    if "text" not in names:
        raise RejectedFile("no column 'text'")
    for name in names:
        if schema.names.count(name) > 1:
            raise RejectedFile(f"column '{name}' appears more than once")
        kind = schema.field(name).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)
        is_other = types.is_integer(value) or types.is_date(value) or types.is_timestamp(value)
        if not is_text and (name == "text" or not is_other):
            raise RejectedFile(f"column '{name}' is of type {str(kind)[:80]}, not string")
    return names


def as_bytes(column: Any) -> list[bytes | None]:
    """Values as UTF-8; numbers, dates and times as Arrow formats them (2024-12-31 23:59:00)."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        column = column.cast(pyarrow.large_string())
    # As binary, so that the parent finds invalid UTF-8 row by row.
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


if __name__ == "__main__":
    main()
