"""Mark on an interruption: finished work is kept for a resume."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NOTE = "finished work is kept"


@contextmanager
def keeping(has_kept: Callable[[], bool]) -> Iterator[None]:
    """Mark an interruption of the block if a resume would find finished work.

    Args:
        has_kept: called when the block is interrupted.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if has_kept():
            stop.add_note(_NOTE)
        raise


def is_kept(stop: BaseException) -> bool:
    """Return whether `keeping` marked an interruption."""
    return _NOTE in getattr(stop, "__notes__", ())
