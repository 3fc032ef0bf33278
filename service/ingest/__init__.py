"""Streaming ingestion: bytes in, chunk by chunk; a published artifact out, in one pass and flat memory.

ingest.py        Ingest: the sink that a body is fed into and published from
stream.py        feeds an async stream of chunks into that sink, on a worker thread
sources.py       opens bodies that are named by a URI
formats.py       formats, content encodings and upload limits
decoding.py      gzip and zstd -> the decoded body
parsing.py       ndjson and text -> documents
parquet.py       Parquet -> documents, through a child process with little memory (parquet_child.py)
documents.py     documents -> documents.ndjson.zst (line_file.py) and their hashes
validation.py    errors of single rows and of the whole body
hash_spool.py    the hashes of a body, in order and in sorted runs
hash_file.py     a sorted file of hashes: membership and ranges
split.py         which documents are new, and which of those are held out
scratch.py       the files of a body until it is published
reading.py       reads documents, and those to train on, from published artifacts
"""
