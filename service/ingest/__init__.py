"""Streaming ingestion: bytes in, in chunks; a published artifact out, in one pass and flat memory.

ingest.py        Ingest: the sink that is fed, ended and published
stream.py        receive: an async stream of chunks into that sink, on a worker thread
sources.py       open_uri: the chunks of a file under the import roots
formats.py       media types, content encodings, limits
decoding.py      gzip, zstd -> the decoded body
parsing.py       the decoded body -> documents (ndjson, text)
parquet.py       the same for Parquet, read by a child process with little memory (parquet_child.py)
documents.py     documents -> documents.ndjson.zst
digests.py       their hashes, in order and in sorted runs
hashfile.py      a sorted file of hashes: membership, ranges
division.py      which documents are new, and which of those are held out
findings.py      what is wrong with a body
reading.py       what others read: documents, and the documents that are trained on
"""
