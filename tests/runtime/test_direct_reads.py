"""A session reads experts past the page cache, or says once why it does not."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.progress import SILENT
from moe_tool.runtime.session import RunOptions, open_session


class _Notes:
    begin, advance, end = SILENT.begin, SILENT.advance, SILENT.end

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_a_file_system_that_refuses_is_announced_once(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    working, notes = os.open, _Notes()

    def refuse(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return working(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with open_session(tiny_bundle("mixtral"), RunOptions(context=16), progress=notes) as session:
        session.empty_cache()
    assert len(notes.said) == 1
    assert "O_DIRECT: Invalid argument" in notes.said[0] and "slower" in notes.said[0]


def test_nothing_is_said_where_it_works(tiny_bundle: Callable[..., Path]) -> None:
    notes = _Notes()
    with open_session(tiny_bundle("mixtral"), RunOptions(context=16), progress=notes) as session:
        refusal = session.bundle.read_directly()
        assert session.bundle.reads_directly == (refusal is None)
    assert notes.said == [] or refusal is not None
