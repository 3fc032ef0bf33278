"""A pack holds the token stream of its documents in full rows, padded with its own beginning."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import ArtifactCorrupt, StageInputInvalid
from workers.data.pack import Pack, write_pack
from workers.data.tokenizer import EncodedBlock


def blocks_of(*blocks: Iterable[int]) -> list[EncodedBlock]:
    return [EncodedBlock(np.array(list(block), dtype=np.int64), 1, 10) for block in blocks]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), sequence_length=st.integers(1, 12))
def test_rows_hold_every_token_with_its_predecessor(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    stream = np.arange(sum(lengths))
    blocks = blocks_of(*np.split(stream, np.cumsum(lengths)[:-1]))
    header = write_pack(folder, blocks, sequence_length=sequence_length, vocab_size=1000)
    pack = Pack(folder)
    assert (header.tokens, header.documents, pack.rows) == (
        len(stream),
        len(lengths),
        -(-len(stream) // sequence_length),
    )
    rows = np.stack([pack.row(index) for index in range(pack.rows)])
    assert rows.shape == (pack.rows, sequence_length + 1)
    inputs, targets = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    assert np.array_equal(inputs, np.arange(len(inputs)) % len(stream))
    assert np.array_equal(targets, np.arange(1, len(inputs) + 1) % len(stream))


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(65_535, 2), (65_536, 4), (200_000, 4)])
def test_tokens_take_two_bytes_if_the_vocabulary_fits(
    tmp_path: Path, vocab_size: int, bytes_per_token: int
) -> None:
    write_pack(tmp_path, blocks_of([1, vocab_size - 1, 0]), sequence_length=2, vocab_size=vocab_size)
    assert (tmp_path / "tokens.bin").stat().st_size == 5 * bytes_per_token
    assert Pack(tmp_path).row(0).tolist() == [1, vocab_size - 1, 0]


def test_packing_no_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageInputInvalid, match="no document"):
        write_pack(tmp_path, [], sequence_length=8, vocab_size=100)


def test_a_truncated_stream_is_corrupt(tmp_path: Path) -> None:
    write_pack(tmp_path, blocks_of(range(20)), sequence_length=4, vocab_size=100)
    (tmp_path / "tokens.bin").write_bytes(b"\0\0")
    with pytest.raises(ArtifactCorrupt):
        Pack(tmp_path)
