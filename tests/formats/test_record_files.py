"""Reading records past the page cache and through it, and files that change meanwhile."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_tool.formats import record_files
from moe_tool.formats.record_files import RecordFiles

BLOCK = 4096
NAME = "records"
CONTENT = bytes(range(256)) * 48 + b"end"  # three blocks and three bytes


@pytest.fixture
def files(tmp_path: Path) -> Iterator[RecordFiles]:
    with (tmp_path / NAME).open("wb") as file:
        file.write(CONTENT)
        os.fsync(file.fileno())
    opened = RecordFiles(tmp_path, [NAME])
    yield opened
    opened.close()


def _be_direct(files: RecordFiles) -> None:
    refusal = files.read_directly()
    if refusal is not None:
        pytest.skip(refusal)
    assert files.is_direct


def _memory(n_bytes: int, *, shift: int) -> torch.Tensor:
    """Memory that begins `shift` bytes after a block's begin, full of 0xEE."""
    room = torch.full((n_bytes + 2 * BLOCK,), 0xEE, dtype=torch.uint8)
    start = -room.data_ptr() % BLOCK + shift
    return room[start : start + n_bytes]


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("direct", [False, True])
def test_a_record_comes_whole_into_aligned_and_other_memory(
    files: RecordFiles, direct: bool, shift: int
) -> None:
    if direct:
        _be_direct(files)
    out = _memory(2 * BLOCK, shift=shift)
    assert files.read_into(NAME, BLOCK, out) == 2 * BLOCK
    assert bytes(out.numpy()) == CONTENT[BLOCK : 3 * BLOCK]


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("direct", [False, True])
def test_the_end_of_the_file_is_told_to_the_byte(
    files: RecordFiles, direct: bool, shift: int
) -> None:
    if direct:
        _be_direct(files)
    out = _memory(4 * BLOCK, shift=shift)
    assert files.read_into(NAME, 2 * BLOCK, out) == BLOCK + 3
    assert files.read_into(NAME, 4 * BLOCK, out) == 0


@pytest.mark.parametrize("direct", [False, True])
def test_a_read_that_comes_in_pieces_goes_on(
    files: RecordFiles, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if direct:
        _be_direct(files)
    whole = os.preadv
    pieces = iter([5000, 4096, 4096]) if direct else iter([7, 5000, 20000])

    def part(handle: int, buffers: list[memoryview], offset: int) -> int:
        wanted = buffers[0][: next(pieces)]
        if not direct:
            return whole(handle, [wanted], offset)
        whole(handle, buffers, offset)
        return len(wanted)

    monkeypatch.setattr(os, "preadv", part)
    out = _memory(3 * BLOCK, shift=0)
    assert files.read_into(NAME, 0, out) == 3 * BLOCK
    assert bytes(out.numpy()) == CONTENT[: 3 * BLOCK]


def test_direct_reads_leave_nothing_in_the_page_cache(files: RecordFiles, tmp_path: Path) -> None:
    _be_direct(files)
    handle = os.open(tmp_path / NAME, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        files.read_into(NAME, 0, _memory(3 * BLOCK, shift=0))
        try:
            with pytest.raises(BlockingIOError):  # nothing to be had without the disk
                os.preadv(handle, [bytearray(BLOCK)], 0, os.RWF_NOWAIT)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP
            pytest.skip("cannot ask what is cached here")
    finally:
        os.close(handle)


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_system_that_refuses_is_named_and_reads_go_on(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    working = getattr(os, call)
    n_open = len(os.listdir("/proc/self/fd"))

    def refuse(*args: object) -> int:
        if call == "preadv" or int(str(args[1])) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(working(*args))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        refusal = files.read_directly()
    assert refusal is not None and "O_DIRECT: Invalid argument" in refusal
    assert not files.is_direct and len(os.listdir("/proc/self/fd")) == n_open
    out = _memory(BLOCK, shift=0)
    assert files.read_into(NAME, 0, out) == BLOCK and bytes(out.numpy()) == CONTENT[:BLOCK]


def test_the_file_system_is_asked_once(files: RecordFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    _be_direct(files)
    monkeypatch.setattr(os, "open", None)
    assert files.read_directly() is None


def _grow(path: Path) -> None:
    path.open("ab").write(b"more")


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, 1))


def _replace(path: Path) -> None:
    """Put a copy of the same size and time in its place."""
    before = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(CONTENT)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.rename(path)


@pytest.mark.parametrize("change", [_grow, _touch, _replace, Path.unlink])
def test_a_file_that_changes_is_noticed(files: RecordFiles, tmp_path: Path, change) -> None:
    assert not files.has_changed(NAME)
    change(tmp_path / NAME)
    assert files.has_changed(NAME)


def test_a_file_stays_found_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    files = RecordFiles(Path("."), [NAME])
    monkeypatch.chdir("/")
    assert not files.has_changed(NAME)
    files.close()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(CONTENT)
    (tmp_path / NAME).symlink_to("other")
    with pytest.raises(OSError) as error:
        RecordFiles(tmp_path, [NAME])
    assert error.value.errno == errno.ELOOP


@pytest.mark.parametrize("direct", [False, True])
def test_a_read_shows_its_pieces(
    files: RecordFiles, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if direct:
        _be_direct(files)
    monkeypatch.setattr(record_files, "PIECE_BYTES", 2 * BLOCK)
    out, told = _memory(3 * BLOCK, shift=0), []

    def on_piece(piece: memoryview) -> bool:
        told.append(bytes(piece))
        return True

    assert files.read_into(NAME, 0, out, on_piece=on_piece) == 3 * BLOCK
    assert bytes(out.numpy()) == CONTENT[: 3 * BLOCK]
    assert told == [CONTENT[: 2 * BLOCK], CONTENT[2 * BLOCK : 3 * BLOCK]]


def test_a_read_that_is_given_up_reads_no_other_piece(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_files, "PIECE_BYTES", BLOCK)
    out = _memory(3 * BLOCK, shift=0)
    assert files.read_into(NAME, 0, out, on_piece=lambda piece: False) is None
    assert bytes(out.numpy()) == CONTENT[:BLOCK] + bytes([0xEE]) * 2 * BLOCK


def test_the_end_of_the_file_is_found_in_pieces_too(
    files: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_files, "PIECE_BYTES", BLOCK)
    out = _memory(3 * BLOCK, shift=0)
    assert files.read_into(NAME, 2 * BLOCK, out, on_piece=lambda piece: True) == BLOCK + 3
