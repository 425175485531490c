"""Rows of a table whose blocks are hashed: the same rows, each block read whole and once."""

from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_tool.artifacts.row_tables import RowTablePart, block_bytes_of
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.block_hashes import BlockHasher, CheckedBlocks
from moe_tool.formats.safetensors_index import read_header
from moe_tool.formats.table_rows import TableRows

WIDTH, BLOCK = 24, 4096
"""Rows of 48 bytes, which blocks do not divide"""


def table(folder: Path, *, n_rows: int = 300) -> tuple[torch.Tensor, TableRows]:
    values = torch.randn(n_rows, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"t": values}, folder / "t.safetensors")
    info = read_header(folder / "t.safetensors")["t"]
    data = values.view(torch.uint8).numpy().tobytes()
    hashes = [xxhash.xxh3_64_hexdigest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
    part = RowTablePart(
        tensor="t", parameter="p", held_bytes=1, block_bytes=BLOCK, xxh3="".join(hashes)
    )
    return values, TableRows.open([info], {}, {"t": CheckedBlocks(part, info)})


@settings(max_examples=40, deadline=None)
@given(calls=st.lists(st.sets(st.integers(0, 299), min_size=1), min_size=1, max_size=4))
def test_any_rows_in_any_order_are_the_tables(
    calls: list[set[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values, rows = table(tmp_path_factory.mktemp("t"))
    for call in calls:
        ids = torch.tensor(sorted(call))
        assert torch.equal(rows.read(ids), values[ids].float())
    assert rows.bytes_read == sum(map(len, calls)) * WIDTH * 2
    rows.close()


def test_only_the_damaged_block_is_refused(tmp_path: Path) -> None:
    values, rows = table(tmp_path)
    rows.close()
    path = tmp_path / "t.safetensors"
    info = read_header(path)["t"]
    data = bytearray(path.read_bytes())
    data[info.offset + BLOCK + 5] ^= 1  # the second block
    path.write_bytes(data)
    assert torch.equal(rows.read(torch.tensor([0, 200])), values[[0, 200]].float())
    with pytest.raises(CorruptArtifactError, match="bytes 4096 to 8192 of 't' does not fit"):
        rows.read(torch.tensor([BLOCK // 48]))  # it begins in the first block, ends in the second
    with pytest.raises(CorruptArtifactError, match="bytes 4096 to 8192"):
        rows.read(torch.tensor([100]))
    rows.close()


@given(st.binary(max_size=200), st.lists(st.integers(1, 50), max_size=12), st.integers(1, 64))
def test_pieces_of_any_size_have_the_hashes_of_blocks(
    data: bytes, cuts: list[int], block: int
) -> None:
    pieces, at = [], 0
    for cut in [*cuts, len(data)]:
        pieces.append(data[at : at + cut])
        at += cut
    hasher = BlockHasher(block)
    assert b"".join(hasher.passed(pieces)) == data
    wanted = [xxhash.xxh3_64_hexdigest(data[k : k + block]) for k in range(0, len(data), block)]
    assert hasher.result() == "".join(wanted)


def test_blocks_grow_so_that_hashes_stay_few() -> None:
    sizes = {1: 2**16, 2**34: 2**16, 2**34 + 1: 2**17, 203 * 10**9: 2**20, 2**60: 2**24}
    assert {size: block_bytes_of(size) for size in sizes} == sizes
