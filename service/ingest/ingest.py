"""The sink of a streamed body: fed chunk by chunk, ended, and published as a data version or an uploaded slice.

    with Ingest(artifacts, DataFormat.NDJSON, ContentEncoding.GZIP) as ingest:
        for chunk in chunks:
            ingest.feed(chunk)
        body = ingest.end()                    # look body.sha256 up to see whether the content is already registered
        version = ingest.publish_version(earlier=[…], uploaded=[…], holdout_fraction=0.02)

Leaving the block deletes everything that is not published. A body can be published again if the versions
before it have changed. Not thread-safe.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from service.artifacts import Artifacts
from service.artifacts.disk_space import translate_disk_full
from service.artifacts.files import sha256_of
from service.core.artifact_files import DOCUMENTS, HASHES, HOLDOUT, HOLDOUT_HASHES
from service.core.manifest import SMALL_BYTES, Manifest
from service.ingest.decoding import decoder
from service.ingest.documents import DocumentSpool
from service.ingest.formats import ContentEncoding, DataFormat, Limits
from service.ingest.hash_file import HashFile, HashSet
from service.ingest.parquet import ParquetParser
from service.ingest.parsing import NdjsonParser, Parser, TextParser
from service.ingest.scratch import Scratch
from service.ingest.split import split_body, write_hashes, write_holdout
from service.ingest.validation import ExpansionMeter, RowErrors, body_error

DEFAULT_LIMITS = Limits()
_BODY = "the body"


@dataclass(frozen=True)
class Body:
    """A complete, valid body. ``sha256`` and ``bytes`` are those of the decoded body."""

    sha256: str
    bytes: int
    documents: int


@dataclass(frozen=True)
class Ingested:
    """A published body: its artifact, and the counts for its row. A slice has no holdout."""

    manifest: Manifest
    sha256: str
    bytes: int
    documents: int
    duplicates: int
    holdout_documents: int


class Ingest:
    def __init__(
        self,
        artifacts: Artifacts,
        format: DataFormat,
        encoding: ContentEncoding | None = None,
        limits: Limits = DEFAULT_LIMITS,
        *,
        small: bool = False,
    ) -> None:
        """``small``: the body is at most a few KiB, so no staging folder is created for it."""
        self._artifacts = artifacts
        self._format = format
        self._decoder = decoder(encoding)
        self._meter = ExpansionMeter(limits)
        self._sha256 = hashlib.sha256()
        self._errors = RowErrors()
        self._body: Body | None = None
        with translate_disk_full(_BODY), ExitStack() as stack:
            self._scratch = stack.enter_context(closing(Scratch(artifacts.root, small=small)))
            self._spool = DocumentSpool(self._scratch, limits)
            stack.callback(self._spool.close)
            self._parser = self._create_parser(format, limits)
            stack.callback(self._parser.close)
            self._stack = stack.pop_all()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the encoded body. Raises BadContent once the body is known to be bad."""
        assert self._body is None
        self._meter.add_encoded(len(chunk))
        with translate_disk_full(_BODY):
            for piece in self._decoder.feed(chunk):
                self._meter.add_decoded(len(piece))
                self._sha256.update(piece)
                self._parser.feed(piece)

    def end(self) -> Body:
        """End the body. Raises BadContent if it has errors or no documents."""
        with translate_disk_full(_BODY):
            self._decoder.end()
            self._parser.end()
            self._errors.check()
            self._spool.seal()
        documents = self._spool.hashes.count
        decoded_bytes = self._meter.decoded_bytes
        if not documents:
            raise body_error("the body has no documents" if decoded_bytes else "the body is empty")
        self._body = Body(self._sha256.hexdigest(), decoded_bytes, documents)
        return self._body

    def publish_version(
        self,
        earlier: Sequence[Path],
        uploaded: Sequence[Path],
        holdout_fraction: float,
        cached: HashSet | None = None,
    ) -> Ingested:
        """Publish the ended body as a data version, under ``data/<fingerprint>``. Raises NothingNew.

        ``earlier`` are the artifact folders of the earlier versions that are not excluded, except those
        whose hashes are ``cached``; ``uploaded`` are those of uploaded evaluation sets. The fingerprint is the
        sha256 of everything that the artifact depends on: sha256 and format of the content, sha256 of the list of
        holdout hashes, and the counts. Can be called again if the earlier versions have changed.
        """
        assert self._body is not None
        with translate_disk_full(_BODY):
            split = split_body(self._spool.hashes, cached, earlier, uploaded, holdout_fraction, self._scratch)
            write_holdout(self._spool, self._scratch)
        files = (DOCUMENTS, HASHES, HOLDOUT, HOLDOUT_HASHES)
        return self._publish("data", self._body, split.duplicates, split.holdout, files)

    def publish_slice(self) -> Ingested:
        """Publish the ended body as an uploaded evaluation set, under ``slice/<fingerprint>``."""
        assert self._body is not None
        with translate_disk_full(_BODY):
            distinct = write_hashes(self._spool.hashes, self._scratch)
        return self._publish("slice", self._body, self._body.documents - distinct, 0, (DOCUMENTS, HASHES))

    def open_hashes(self, ingested: Ingested) -> HashFile:
        """The distinct document hashes of the published body. The caller closes them."""
        manifest = ingested.manifest
        return HashFile(manifest.file(HASHES).content or self._artifacts.path(manifest, HASHES))

    def is_published(self, ingested: Ingested) -> bool:
        """Whether the artifact still exists. If it does not, publish the body again."""
        return self._artifacts.exists(ingested.manifest.key)

    def close(self) -> None:
        """Delete everything that is not published."""
        # Closing flushes buffers. On a full disk that fails, which does not matter for files to be deleted.
        with suppress(OSError):
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _create_parser(self, format: DataFormat, limits: Limits) -> Parser:
        match format:
            case DataFormat.NDJSON:
                return NdjsonParser(self._spool, self._errors, limits)
            case DataFormat.TEXT:
                return TextParser(self._spool, self._errors, limits)
            case DataFormat.PARQUET:
                return ParquetParser(self._spool, self._errors, limits, self._scratch.folder)

    def _publish(
        self, prefix: str, body: Body, duplicates: int, holdout: int, files: Sequence[str]
    ) -> Ingested:
        result = {
            **asdict(body),
            "format": str(self._format),
            "duplicates": duplicates,
            "holdout_documents": holdout,
        }
        depends_on = dict(result)
        if holdout:
            depends_on["holdout_sha256"] = _sha256(self._scratch.source(HOLDOUT_HASHES))
        fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        key = f"{prefix}/{fingerprint}"
        small = {name: content for name in files if (content := self._scratch.small(name)) is not None}
        if len(small) == len(files) and sum(map(len, small.values())) <= SMALL_BYTES:
            manifest = self._artifacts.publish_small(key, small, result)
        else:
            with self._artifacts.writing(key) as directory:
                for name in files:
                    self._move_or_link(name, directory)
                manifest = self._artifacts.publish(key, directory, result)
        return Ingested(manifest, body.sha256, body.bytes, body.documents, duplicates, holdout)

    def _move_or_link(self, name: str, directory: Path) -> None:
        source = self._scratch.source(name)
        if isinstance(source, bytes):
            (directory / name).write_bytes(source)
        elif name == DOCUMENTS:
            os.link(source, directory / name)  # a second publication needs it again
        else:
            os.replace(source, directory / name)  # a second publication writes a new one


def _sha256(source: bytes | Path) -> str:
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_of(source)
