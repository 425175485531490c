"""Fixture of the compiled implementations, shared by all suites of kernels."""

from collections.abc import Iterator

import pytest

from moe_tool.native.kernels import NAMES, round_tokens, set_threads, use_lookup


@pytest.fixture(params=NAMES)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled implementation that this processor has, in use; then everything as it was."""
    compiled = pytest.importorskip("moe_tool.native._kernels")
    best = compiled.in_use()
    if not compiled.use(request.param):
        pytest.skip(f"this processor lacks {request.param}")
    yield request.param
    compiled.use(best)
    set_threads(1)
    round_tokens(False)
    use_lookup(1, 0)
    use_lookup(2, 0)
