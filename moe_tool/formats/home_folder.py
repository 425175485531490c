"""Paths that begin in somebody's home folder."""

from pathlib import Path


def from_home(path: str | Path) -> Path:
    """Return a path with ~ and ~user replaced, or as it is if there is no such user or home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
