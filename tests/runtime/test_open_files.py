"""A session leaves no file open behind it, whether it was closed or refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import BudgetError
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session


def _n_open() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_fifty_sessions_leave_no_file_open(tiny_bundle: Callable[..., Path]) -> None:
    bundle, counts = tiny_bundle("mixtral"), []
    for _ in range(50):
        with open_session(bundle, run_options(memory="50%", context=64)):
            assert not counts or _n_open() > counts[-1]
        counts.append(_n_open())
    assert len(set(counts[1:])) == 1  # the first one opens what the libraries keep


def test_refused_sessions_leave_no_file_open(tiny_bundle: Callable[..., Path]) -> None:
    bundle, counts = tiny_bundle("mixtral"), []
    for _ in range(3):
        with pytest.raises(BudgetError):
            open_session(bundle, run_options(memory="1MiB", context=64))
        counts.append(_n_open())
    assert len(set(counts[1:])) == 1
