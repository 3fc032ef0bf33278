"""Output of commands: tables on a terminal, plain columns in a pipe, or one JSON document."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import IO

from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table

# Wide enough never to wrap lines in a pipe.
PIPE_WIDTH = 1000


def console(stream: IO[str] | None = None) -> Console:
    """A console on ``stream``, by default stdout."""
    stream = stream or sys.stdout
    plain = not stream.isatty()
    return Console(file=stream, highlight=False, width=PIPE_WIDTH if plain else None)


def print_json(document: BaseModel | Sequence[BaseModel]) -> None:
    if isinstance(document, BaseModel):
        print(document.model_dump_json(indent=2))
    else:
        print(json.dumps([item.model_dump(mode="json") for item in document], indent=2))


def new_table(*columns: str, title: str | None = None) -> Table:
    """An empty table. Columns whose name begins with ``>`` are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def print_table(table: Table) -> None:
    out = console()
    if not out.is_terminal:
        table.box, table.title_style = None, ""
    out.print(table, soft_wrap=not out.is_terminal)
    if table.title and not out.is_terminal:
        out.print()


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    table = new_table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    print_table(table)


# --- numbers for people ---


def count(number: float | None) -> str:
    """A count; counts of 10,000 or more have three significant digits and an SI prefix."""
    if number is None:
        return "–"
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    letters = iter("kMGTPEZ")
    letter = ""
    while abs(number) >= 999.5:
        number, letter = number / 1000, next(letters)
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f} {letter}"


def size(num_bytes: float) -> str:
    return f"{count(num_bytes)}B" if num_bytes >= 10_000 else f"{num_bytes:.0f} B"


def loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def rate(value: float) -> str:
    """A learning rate, such as 2.00e-3."""
    return "0" if value == 0 else f"{value:.2e}".replace("e-0", "e-")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
