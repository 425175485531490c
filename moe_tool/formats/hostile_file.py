"""Opening of untrusted files: a plain file or a named error, and safe quotes of their content."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_tool.errors import CorruptArtifactError, NotFoundError, StorageError

MAX_QUOTED_CHARACTERS = 120


def open_plain_file(path: Path, *, remedy: str, missing: str = "") -> BinaryIO:
    """Open a file for reading; never block on a pipe, never read a device.

    Args:
        path: links are followed, since the hub's cache consists of links.
        missing: hint if the file is missing, where it differs.

    Raises:
        NotFoundError: the file, or what it links to, does not exist.
        CorruptArtifactError: it is a folder, a pipe or a device.
        StorageError: it cannot be opened.
    """
    with reading(path):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            if os.path.islink(path):
                target = quoted(os.readlink(path))
                raise NotFoundError(
                    f"{path} is a link to {target}, which is not there", hint=remedy
                ) from error
            raise NotFoundError(f"{path} does not exist", hint=missing or remedy) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CorruptArtifactError(f"{path} is not a file", hint=remedy)
    return os.fdopen(handle, "rb")


def read_capped(path: Path, *, limit_bytes: int, remedy: str) -> bytes:
    """Return the bytes of a plain file of at most `limit_bytes`.

    Raises:
        NotFoundError: the file does not exist.
        CorruptArtifactError: it is no plain file, or larger.
        StorageError: it cannot be read.
    """
    with reading(path), open_plain_file(path, remedy=remedy) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit_bytes + 1) if size <= limit_bytes else b""
    if max(size, len(data)) > limit_bytes:
        raise CorruptArtifactError(
            f"{path} has {size} bytes, wanted at most {limit_bytes}", hint=remedy
        )
    return data


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about reading a path into named ones."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotFoundError(
                f"{error.filename or path} is a link that leads back to itself",
                hint="put the file itself there",
            ) from error
        raise StorageError(
            f"{error.filename or path}: {error.strerror or error}",
            hint="check its permissions and the disk",
        ) from error


def quoted(text: object) -> str:
    """Return text from a hostile file as a short literal: no newlines, no terminal codes."""
    whole = str(text)
    end = "..." if len(whole) > MAX_QUOTED_CHARACTERS else ""
    return ascii(whole[:MAX_QUOTED_CHARACTERS]) + end


def one_line(text: object) -> str:
    """Return a complaint about a hostile file as one short printable line."""
    first = next(iter(str(text).strip().splitlines()), "")
    return "".join(c if c.isprintable() else "?" for c in first[:200])
