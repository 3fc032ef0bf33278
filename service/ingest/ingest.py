"""The sink of a streamed body: fed chunk by chunk, ended, and published as a data version or a given slice.

    with Ingest(artifacts, DataFormat.NDJSON, ContentEncoding.GZIP) as ingest:
        for chunk in chunks:
            ingest.feed(chunk)
        body = ingest.end()                    # its sha256: is this content registered already?
        version = ingest.publish_version(earlier=[…], given=[…], holdout_fraction=0.02)

Whatever goes wrong, nothing remains on disk. A body may be published again, where what came before it has
changed meanwhile. Nothing here is for more than one thread at a time.
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
from service.ingest.division import divide, write_hashes, write_holdout
from service.ingest.documents import DocumentSpool
from service.ingest.findings import Findings, Meter, bad_body
from service.ingest.formats import ContentEncoding, DataFormat, Limits
from service.ingest.hash_memory import NOTHING, SMALL_DOCUMENTS, Remembered
from service.ingest.hashfile import HashFile
from service.ingest.parquet import ParquetParser
from service.ingest.parsing import NdjsonParser, Parser, TextParser
from service.ingest.scratch import Scratch

DEFAULT_LIMITS = Limits()
_BODY = "the body"


@dataclass(frozen=True)
class Body:
    """A body that was read to its end and is good. ``sha256`` and ``bytes`` are of the decoded body."""

    sha256: str
    bytes: int
    documents: int


@dataclass(frozen=True)
class Ingested:
    """What was published: the artifact, and what its row says. A slice has no holdout."""

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
        """``small``: the body is known to be of a few KiB, for which no staging folder is made."""
        self._artifacts = artifacts
        self._format = format
        self._decoder = decoder(encoding)
        self._meter = Meter(limits)
        self._sha256 = hashlib.sha256()
        self._findings = Findings()
        self._body: Body | None = None
        with translate_disk_full(_BODY), ExitStack() as stack:
            self._scratch = stack.enter_context(closing(Scratch(artifacts.root, small=small)))
            self._spool = DocumentSpool(self._scratch, limits)
            stack.callback(self._spool.close)
            self._parser = self._parser_of(format, limits)
            stack.callback(self._parser.close)
            self._stack = stack.pop_all()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the encoded body. Raises BadContent where reading on is pointless."""
        assert self._body is None
        self._meter.encoded += len(chunk)
        with translate_disk_full(_BODY):
            for piece in self._decoder.feed(chunk):
                self._meter.count(len(piece))
                self._sha256.update(piece)
                self._parser.feed(piece)

    def end(self) -> Body:
        """Take the body as whole. Raises BadContent where it has flaws, or no documents."""
        with translate_disk_full(_BODY):
            self._decoder.end()
            self._parser.end()
            self._findings.check()
            self._spool.seal()
        documents = self._spool.digests.count
        if not documents:
            raise bad_body("the body is empty" if not self._meter.decoded else "the body has no documents")
        self._body = Body(self._sha256.hexdigest(), self._meter.decoded, documents)
        return self._body

    def publish_version(
        self,
        earlier: Sequence[Path],
        given: Sequence[Path],
        holdout_fraction: float,
        remembered: Remembered = NOTHING,
    ) -> Ingested:
        """Publish the ended body as a data version: ``data/<fingerprint>``. Raises NothingNew.

        ``earlier`` are the artifact folders of the earlier versions that are not excluded and not ``remembered``,
        ``given`` those of the given evaluation sets. The fingerprint is sha256 of what the artifact depends on: the content's
        sha256 and format, the sha256 of the list of holdout hashes, and the counts. Can be called again where
        the earlier versions turn out to be others by now.
        """
        assert self._body is not None
        with translate_disk_full(_BODY):
            division = divide(
                self._spool.digests, earlier, given, holdout_fraction, self._scratch, remembered
            )
            write_holdout(self._spool, self._scratch)
        files = (DOCUMENTS, HASHES, HOLDOUT, HOLDOUT_HASHES)
        return self._publish("data", self._body, division.duplicates, division.holdout, files)

    def hashes(self) -> list[bytes] | None:
        """The distinct hashes of the ended body's documents, sorted; None where they are more than SMALL_DOCUMENTS."""
        if self._spool.digests.count > SMALL_DOCUMENTS:
            return None
        return [digest for block in self._spool.digests.merged() for digest in block]

    def publish_slice(self) -> Ingested:
        """Publish the ended body as a given evaluation set: ``slice/<fingerprint>``, likewise."""
        assert self._body is not None
        with translate_disk_full(_BODY):
            distinct = write_hashes(self._spool.digests, self._scratch)
        return self._publish("slice", self._body, self._body.documents - distinct, 0, (DOCUMENTS, HASHES))

    def published_hashes(self, ingested: Ingested) -> HashFile:
        """The distinct hashes of the documents of what was published, to be closed."""
        manifest = ingested.manifest
        return HashFile(manifest.file(HASHES).content or self._artifacts.path(manifest, HASHES))

    def has(self, ingested: Ingested) -> bool:
        """Whether it is published still. Where it is not, publish again."""
        return self._artifacts.exists(ingested.manifest.key)

    def close(self) -> None:
        """Remove what is not published."""
        # Files that are closed write what they hold back, for which a full disk has no room, and nobody a use.
        with suppress(OSError):
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parser_of(self, format: DataFormat, limits: Limits) -> Parser:
        match format:
            case DataFormat.NDJSON:
                return NdjsonParser(self._spool, self._findings, limits)
            case DataFormat.TEXT:
                return TextParser(self._spool, self._findings, limits)
            case DataFormat.PARQUET:
                return ParquetParser(self._spool, self._findings, limits, self._scratch.folder)

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
                    self._place(name, directory)
                manifest = self._artifacts.publish(key, directory, result)
        return Ingested(manifest, body.sha256, body.bytes, body.documents, duplicates, holdout)

    def _place(self, name: str, directory: Path) -> None:
        source = self._scratch.source(name)
        if isinstance(source, bytes):
            (directory / name).write_bytes(source)
        else:
            # Linked, so that the body can be published again; whatever is written again must not be.
            place = os.link if name == DOCUMENTS else os.replace
            place(source, directory / name)


def _sha256(source: bytes | Path) -> str:
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_of(source)
