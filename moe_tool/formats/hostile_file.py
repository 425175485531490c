"""Opening of untrusted files: a plain file or a named error, and safe quotes of their content."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from moe_tool.errors import CorruptArtifactError, NotFoundError, StorageError

MAX_QUOTED_CHARACTERS = 120


def open_plain_file(path: Path, *, remedy: str, missing: str = "") -> BinaryIO:
    """Open a file for reading; never block on a pipe, never read a device.

    Args:
        path: links are followed, since the hub's cache consists of links.
        remedy: hint of the errors.
        missing: hint if the file is missing, where it differs.

    Raises:
        NotFoundError: the file does not exist.
        CorruptArtifactError: it is a folder, a pipe or a device.
        StorageError: it cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{path} does not exist", hint=missing or remedy) from error
    except OSError as error:
        raise unreadable(path, error) from error
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
    try:
        with open_plain_file(path, remedy=remedy) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit_bytes + 1) if size <= limit_bytes else b""
    except OSError as error:
        raise unreadable(path, error) from error
    if max(size, len(data)) > limit_bytes:
        raise CorruptArtifactError(
            f"{path} has {size} bytes, wanted at most {limit_bytes}", hint=remedy
        )
    return data


def unreadable(path: Path, error: OSError) -> StorageError:
    """Return the named error for a file that the operating system cannot read."""
    return StorageError(
        f"{path}: {error.strerror or error}", hint="check its permissions and the disk"
    )


def quoted(text: object) -> str:
    """Return text from a hostile file as a short literal: no newlines, no terminal codes."""
    whole = str(text)
    end = "..." if len(whole) > MAX_QUOTED_CHARACTERS else ""
    return ascii(whole[:MAX_QUOTED_CHARACTERS]) + end


def one_line(text: object) -> str:
    """Return a complaint about a hostile file as one short printable line."""
    first = next(iter(str(text).strip().splitlines()), "")
    return "".join(c if c.isprintable() else "?" for c in first[:200])
