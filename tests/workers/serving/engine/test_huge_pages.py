"""What stays as long as an engine lies together, in memory that goes with the last of it."""

import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from workers.serving.engine.huge_pages import CHUNK_BYTES, HUGE_PAGE_BYTES, HugePages


@pytest.fixture(autouse=True, params=[True, False], ids=["inference", "outside it"])
def inference(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode(request.param):
        yield


def _mapped_bytes(address: int) -> int:
    """Of the mapping that the address is in; 0 where there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            return end - begin
    return 0


def test_tensors_lie_one_after_another_and_keep_what_is_written() -> None:
    memory = HugePages()
    strided = torch.arange(24.0).view(4, 6).t()
    first, second = memory.copy(strided), memory.empty((3, 5), torch.bfloat16)
    second.fill_(2.0)
    third = memory.copy(torch.arange(7))
    assert first.is_contiguous()
    assert torch.equal(first, strided)
    assert torch.equal(second, torch.full((3, 5), 2.0, dtype=torch.bfloat16))
    assert torch.equal(third, torch.arange(7))
    assert first.data_ptr() % HUGE_PAGE_BYTES == 0
    assert second.data_ptr() == first.data_ptr() + 128  # 96 bytes, and to the next line of the cache
    assert third.data_ptr() == second.data_ptr() + 64


def test_more_than_a_chunk_and_nothing_at_all_have_their_place() -> None:
    memory = HugePages()
    small = memory.empty((3,), torch.float32).fill_(1.0)
    large = memory.empty((CHUNK_BYTES,), torch.float32)
    assert large.data_ptr() % HUGE_PAGE_BYTES == 0
    large[-1] = 3.0
    assert memory.empty((0, 4), torch.float32).shape == (0, 4)
    assert memory.copy(torch.ones(2)).tolist() == [1.0, 1.0]
    assert small.tolist() == [1.0, 1.0, 1.0]


def test_memory_goes_with_the_last_tensor_in_it() -> None:
    memory = HugePages()
    one, other = memory.empty((5,), torch.float32), memory.empty((5,), torch.float32).fill_(1.0)
    address = other.data_ptr()
    del memory, one
    gc.collect()
    assert _mapped_bytes(address) >= CHUNK_BYTES
    assert other.tolist() == [1.0] * 5
    del other
    gc.collect()
    assert _mapped_bytes(address) < CHUNK_BYTES  # whatever lies there now


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)
def test_pages_are_asked_to_be_huge() -> None:
    tensor = HugePages().empty((CHUNK_BYTES // 4,), torch.float32).zero_()
    smaps = Path("/proc/self/smaps").read_text()
    flags = {}
    for begin, end, rest in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*\n((?:[A-Z].*\n)+)", smaps, re.MULTILINE):
        flags[range(int(begin, 16), int(end, 16))] = rest
    [ours] = [rest for addresses, rest in flags.items() if tensor.data_ptr() in addresses]
    assert re.search(r"VmFlags:.*\bhg\b", ours)
