"""Files appear whole or not at all, and the disk's refusals have names."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import DiskFullError, StorageError
from moe_tool.formats.atomic_write import (
    atomic_file,
    atomic_write_bytes,
    require_free_disk,
    storage_errors,
)


def failing(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_is_written_into_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "a" / "b" / "file", b"data")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"data"
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("code", "error", "exit_code"),
    [
        (errno.ENOSPC, DiskFullError, 4),
        (errno.EDQUOT, DiskFullError, 4),
        (errno.EIO, StorageError, 3),
        (errno.EROFS, StorageError, 3),
        (errno.EACCES, StorageError, 3),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_disks_refusals_have_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    error: type[StorageError],
    exit_code: int,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(error, match=str(path)) as caught:
            atomic_write_bytes(path, b"new")
    assert caught.value.exit_code == exit_code and caught.value.hint
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_at_the_files_place_stays(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageError, match="file"):
        atomic_write_bytes(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"] and os.listdir(tmp_path / "file") == []


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(b"a file")
    with pytest.raises(StorageError, match="folder"):
        atomic_write_bytes(tmp_path / "folder" / "file", b"new")


def test_too_little_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    require_free_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(DiskFullError) as caught:
        require_free_disk(tmp_path / "not" / "there", 2**60)
    assert str(2**60) in caught.value.message and "are free" in caught.value.message
    assert caught.value.exit_code == 4


def test_other_exceptions_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), storage_errors(tmp_path):
        raise KeyError("ours")
