"""Fixtures of more than one room: tiny random checkpoints, each written once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny_models import make_tiny_checkpoint

# A busy machine is no fault of the code.
settings.register_profile("moe-tool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moe-tool")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return (arch, dtype="float32") -> folder of a tiny checkpoint; never change what it holds."""
    made: dict[tuple[str, str], Path] = {}

    def make(arch: str, dtype: str = "float32") -> Path:
        key = (arch, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{arch}-{dtype}")
            made[key] = make_tiny_checkpoint(arch, folder, dtype=dtype)
        return made[key]

    return make
