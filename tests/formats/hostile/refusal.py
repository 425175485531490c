"""What every refusal has to look like."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.formats.hostile.damage import Case
from tests.formats.samples import tree_hash


def require_refusal(case: Case, root: Path, read: Callable[[], object]) -> None:
    """Read a damaged input; the error is named, whole and the input untouched."""
    before = tree_hash(root)
    with pytest.raises(case.error) as caught:
        read()
    error = caught.value
    assert type(error) is case.error
    assert error.exit_code == 3
    assert "\n" not in error.message and error.message.isprintable()
    assert len(error.message) < 700
    assert str(root) in error.message, error.message
    assert case.says in error.message, error.message
    assert error.hint and "\n" not in error.hint
    assert tree_hash(root) == before


def cases(*given: Case) -> pytest.MarkDecorator:
    """One test per case."""
    return pytest.mark.parametrize("case", given, ids=[case.name for case in given])
