"""Identity of a file's content without reading it: whether a file that was checked is unchanged."""

import os

FileIdentity = tuple[int, int, int]
"""Inode, size in bytes, time of the last change in ns"""


def file_identity(found: os.stat_result) -> FileIdentity:
    """Return the identity by a file's status."""
    return found.st_ino, found.st_size, found.st_mtime_ns
