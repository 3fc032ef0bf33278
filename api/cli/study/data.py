"""Data of a study: `train/` and `validation/` with one file per data version, or their text cut by date."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.cli.errors import CliError
from service.core.errors import InvalidRequest
from service.ingest.formats import ContentEncoding, DataFormat, format_of_path


@dataclass(frozen=True)
class DataFile:
    """The content of one data version or slice."""

    label: str
    content: bytes
    format: DataFormat
    encoding: ContentEncoding | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class StudyData:
    """Data versions, oldest first, and the slice of each.

    Without slices, each version holds out documents instead.
    """

    versions: tuple[DataFile, ...]
    slices: tuple[DataFile, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(version.label for version in self.versions)

    @property
    def digest(self) -> str:
        hashes = [body.sha256 for body in (*self.versions, *self.slices)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:8]


def load_data(folder: Path, *, versions: int | None = None, cut: Sequence[int] | None = None) -> StudyData:
    """Load the first ``versions`` files of the folder, or cut their text by the byte shares in ``cut``.

    Slices are cut at the same dates as the training text. Raises CliError if the folder lacks what is needed.
    """
    train = _files(folder / "train")
    if not train:
        raise CliError(f"{folder / 'train'} has no files", "Put one file per data version there.")
    validation = _files(folder / "validation")
    if validation and len(validation) < len(train):
        raise CliError(
            f"{folder / 'validation'} has fewer files than train",
            "It needs one file per data version, or none.",
        )
    count = len(train) if versions is None else versions
    if not 1 <= count <= len(train):
        raise CliError(f"{folder} has {len(train)} data versions, not {count}")
    train, validation = train[:count], validation[:count]
    if cut is not None:
        return _cut(train, validation, cut)
    data = StudyData(tuple(map(_body, train)), tuple(map(_body, validation)))
    if len(set(data.labels)) < count:
        raise CliError(f"two files of {folder / 'train'} have the same label", ", ".join(data.labels))
    return data


def parse_shares(text: str) -> tuple[int, ...]:
    """Parse ``8`` (eight equal pieces) or ``10:10:10:3`` (four pieces, the last one smaller).

    Raises CliError.
    """
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)*", text):
        raise CliError(f"--cut {text}: expected a number of pieces, or shares such as 10:10:10:3")
    shares = tuple(int(part) for part in text.split(":"))
    return shares if len(shares) > 1 else (1,) * shares[0]


def _files(folder: Path) -> list[Path]:
    """Files in the natural order of the numbers in their names."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(
        files,
        key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)],
    )


def _body(path: Path) -> DataFile:
    try:
        format, encoding = format_of_path(path.name)
    except InvalidRequest as error:
        raise CliError(f"{path}: {error.detail}") from error
    if format is None:
        raise CliError(
            f"cannot tell the format of {path} from its suffix",
            "Use .ndjson, .jsonl, .txt or .parquet, optionally with .gz or .zst.",
        )
    label = path.name.rsplit(".", 1 if encoding is None else 2)[0]
    return DataFile(label, path.read_bytes(), format, encoding)


def _cut(train: Sequence[Path], validation: Sequence[Path], shares: Sequence[int]) -> StudyData:
    documents = sorted(_documents(train), key=_date)
    sizes = [len(document["text"].encode()) for document in documents]
    if len(documents) < len(shares):
        raise CliError(f"{len(documents)} documents cannot be cut into {len(shares)} pieces")
    pieces: list[list[dict[str, Any]]] = [[] for _ in shares]
    ends = [sum(shares[: piece + 1]) / sum(shares) * sum(sizes) for piece in range(len(shares))]
    num_bytes, piece = 0, 0
    for document, size in zip(documents, sizes, strict=True):
        # A document belongs to the piece that contains its middle, but no piece may stay empty.
        while piece + 1 < len(shares) and pieces[piece] and num_bytes + size / 2 > ends[piece]:
            piece += 1
        pieces[piece].append(document)
        num_bytes += size
    if not all(pieces):
        raise CliError("a document is longer than a piece", "Cut the text into fewer pieces.")
    starts = [_date(documents[0]) for documents in pieces]
    slices: list[list[dict[str, Any]]] = [[] for _ in shares]
    for document in _documents(validation):
        slices[max(0, sum(_date(document) >= start for start in starts) - 1)].append(document)
    if validation and not all(slices):
        raise CliError("a piece has no validation documents for its dates", "Cut the text into fewer pieces.")
    return StudyData(
        tuple(_ndjson(f"v{n}", piece) for n, piece in enumerate(pieces, 1)),
        tuple(_ndjson(f"v{n}", piece) for n, piece in enumerate(slices, 1)) if validation else (),
    )


def _documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    found = []
    for path in paths:
        body = _body(path)
        if body.format != DataFormat.NDJSON or body.encoding is not None:
            raise CliError(f"--cut cannot read {path}", "It needs uncompressed NDJSON.")
        lines = enumerate(body.content.splitlines(), 1)
        found += [_document(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return found


def _document(line: bytes, location: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise CliError(f"{location} is not valid JSON", str(error)) from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise CliError(f"{location} is not an object with a text")
    return document


def _date(document: dict[str, Any]) -> str:
    date = document.get("date")
    if not isinstance(date, str):
        raise CliError(
            f"the document {document.get('id', document['text'][:40])!r} has no date, which --cut needs"
        )
    return date


def _ndjson(label: str, documents: Sequence[dict[str, Any]]) -> DataFile:
    content = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    return DataFile(label, content.encode(), DataFormat.NDJSON)
