"""Bundles of tiny models, each packed once per test session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.models.locate import LocatedModel
from tests.packed import pack_bundle


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return (arch, bits="native", dtype="float32", skeleton_bits="native") -> folder of a bundle;
    never change it."""
    made: dict[tuple[str, ...], Path] = {}

    def make(
        arch: str, bits: str = "native", dtype: str = "float32", skeleton_bits: str = "native"
    ) -> Path:
        key = (arch, bits, dtype, skeleton_bits)
        if key not in made:
            folder = tiny_checkpoint(arch, dtype=dtype)
            out = tmp_path_factory.mktemp("bundles") / "-".join(key)
            model = LocatedModel(folder=folder, name=arch)
            pack_bundle(model, out=out, bits=bits, skeleton_bits=skeleton_bits)
            made[key] = out
        return made[key]

    return make
