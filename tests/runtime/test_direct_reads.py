"""A session reads experts past the page cache, or says once why it does not."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.progress import SILENT
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session


class _Notes:
    begin, advance, end = SILENT.begin, SILENT.advance, SILENT.end

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def about_reading(self) -> list[str]:
        """All but the note that the kernels are not in use, which a run without them begins
        with."""
        return [text for text in self.said if "native kernels" not in text]


def test_a_file_system_that_refuses_is_announced_once(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    working, notes = os.open, _Notes()

    def refuse(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return working(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with open_session(tiny_bundle("mixtral"), run_options(context=16), progress=notes) as session:
        session.empty_cache()
    (said,) = notes.about_reading()
    assert "O_DIRECT: Invalid argument" in said and "slower" in said


def test_nothing_is_said_where_it_works(tiny_bundle: Callable[..., Path]) -> None:
    notes = _Notes()
    with open_session(tiny_bundle("mixtral"), run_options(context=16), progress=notes) as session:
        refusal = session.bundle.read_directly()
        assert session.bundle._files.is_direct == (refusal is None)
    assert notes.about_reading() == [] or refusal is not None


@pytest.mark.parametrize("is_native", [True, False])
def test_missing_kernels_are_announced_once(
    is_native: bool, tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = _Notes()
    monkeypatch.setattr("moe_tool.runtime.plan_run.is_native", lambda: is_native)
    with open_session(tiny_bundle("mixtral"), run_options(context=16), progress=notes):
        pass
    assert sum("native kernels" in text for text in notes.said) == (0 if is_native else 1)
