"""The disk is read as asked, and nothing is left on it."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from moe_tool.errors import DiskFullError, NotFoundError, StorageError
from moe_tool.formats.record_files import RecordFiles
from moe_tool.hardware import disk
from moe_tool.hardware.disk import measure_disk
from moe_tool.progress import SILENT

MIB = 2**20
TINY = {
    "file_bytes": MIB,
    "pass_s": 0.01,
    "repetitions": 1,
    "random_bytes": (4096, 65536),
    "sequential_bytes": 65536,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file of somebody's."""
    (tmp_path / "mine").write_text("x")
    return tmp_path


def measure(folder: Path, **changed):
    return measure_disk(folder, **(TINY | changed))


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_every_kind_of_read_has_a_row(folder: Path) -> None:
    rows = measure(folder)
    assert [(row.pattern, row.read_bytes, row.readers) for row in rows] == [
        (pattern, size, readers)
        for pattern, size in (("sequential", 65536), ("random", 4096), ("random", 65536))
        for readers in (1, 2, 4)
    ]
    assert names(folder) == ["mine"]


def test_every_record_is_read_once_whole_and_in_the_order_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, offsets = RecordFiles.read_into, []

    def noted(self, name, offset, out, **more):
        offsets.append((out.numel(), offset))
        return real(self, name, offset, out, **more)

    monkeypatch.setattr(RecordFiles, "read_into", noted)
    monkeypatch.setattr(disk, "READERS", (1,))
    measure(folder, pass_s=60.0, random_bytes=(4096,))
    sequential, random = offsets[: MIB // 65536], offsets[MIB // 65536 :]
    assert sequential == [(65536, offset) for offset in range(0, MIB, 65536)]
    assert random != sorted(random)
    assert len(set(random)) == len(random) == 64  # bursts of one
    assert set(random) <= {(4096, offset) for offset in range(0, MIB, 4096)}


def test_the_rate_is_bytes_over_the_clock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(disk.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(disk, "READERS", (1,))
    rows = measure(folder, pass_s=15.0, random_bytes=(4096,))
    # Clock: 0 the end is set to 15, 10 the start, 20 after one read it is over, 30 the end. A burst
    # begins and ends with a look at it, and the second ends after 15.
    assert [row.bytes_per_s for row in rows] == [65536 / 20, 2 * 4096 / 20]


def test_the_page_cache_is_measured_where_direct_reads_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten, notes = [], []

    class Told:
        def note(self, text: str) -> None:
            notes.append(text)

        def __getattr__(self, name: str):
            return getattr(SILENT, name)

    monkeypatch.setattr(RecordFiles, "read_directly", lambda self: "this disk refuses")
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: forgotten.append(arguments))
    measure(folder, progress=Told())
    assert notes == ["this disk refuses: the disk is measured through the page cache"]
    assert len(forgotten) == 9
    assert {arguments[1:] for arguments in forgotten} == {(0, 0, os.POSIX_FADV_DONTNEED)}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken"), ValueError()])
@pytest.mark.parametrize("where", ["write", "read", "open"])
def test_nothing_is_left_whatever_happens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    target, name = {
        "write": (disk, "_fill"),
        "read": (RecordFiles, "read_into"),
        "open": (RecordFiles, "read_directly"),
    }[where]
    monkeypatch.setattr(target, name, fail)
    wanted = StorageError if isinstance(error, OSError) else type(error)
    n_handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(wanted):
        measure(folder)
    assert names(folder) == ["mine"]
    assert len(os.listdir("/proc/self/fd")) == n_handles


def test_the_file_has_no_name_while_it_is_written_and_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], disk._fill

    def noted(*arguments) -> None:
        seen.append(names(folder))
        real(*arguments)
        seen.append(names(folder))

    monkeypatch.setattr(disk, "_fill", noted)
    measure(folder)
    assert seen == [["mine"], ["mine"]]


def test_a_short_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordFiles, "read_into", lambda self, name, offset, out: 512)
    with pytest.raises(StorageError, match="512 of 65536 bytes"):
        measure(folder)
    assert names(folder) == ["mine"]


def test_a_full_disk_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - MIB, MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(disk, "_fill", None)
    with pytest.raises(DiskFullError, match=r"1.00 MiB are free") as caught:
        measure(folder)
    assert caught.value.exit_code == 4
    assert names(folder) == ["mine"]


def test_a_disk_that_fills_up_meanwhile_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match="no space is left"):
        measure(folder)
    assert names(folder) == ["mine"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere is not a folder"):
        measure(tmp_path / "nowhere")
