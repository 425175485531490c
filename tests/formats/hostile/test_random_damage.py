"""Random damage: a named error, or the very content that was written; never anything else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.buddy_map import BuddyMap
from moe_tool.errors import MoeToolError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.formats.safetensors_index import Checkpoint
from tests.formats import samples

DAMAGE = st.tuples(
    st.sampled_from(["flip", "set", "cut"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
)
BOUNDED = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def damaged(data: bytes, how: str, where: float, value: int) -> bytes:
    """Flip one bit, overwrite one byte, or cut."""
    position = int(where * len(data))
    if how == "cut":
        return data[:position]
    byte = data[position] ^ (1 << value % 8) if how == "flip" else value
    return data[:position] + bytes([byte]) + data[position + 1 :]


def require_named_or_equal(path: Path, good: bytes, bad: bytes, read: Callable[[], object]) -> None:
    path.write_bytes(bad)
    try:
        found = read()
    except MoeToolError as error:
        assert error.exit_code == 3 and error.hint and "\n" not in error.message
    else:
        path.write_bytes(good)
        assert found == read()
    finally:
        path.write_bytes(good)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.make_profile(tmp_path_factory.mktemp("profile") / "tiny.h5")


@pytest.fixture(scope="module")
def buddies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.make_buddies(tmp_path_factory.mktemp("buddies") / "tiny.buddies.json")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    samples.write_bundle(folder / "bundle", samples.make_checkpoint(folder / "model"))
    return folder / "bundle"


@BOUNDED
@given(damage=DAMAGE)
def test_a_profile(profile: Path, damage: tuple[str, float, int]) -> None:
    def read() -> object:
        with ProfileReader.open(profile) as reader:
            _ = reader.tokens
            values = [(reader.trace(layer), reader.statistics(layer)) for layer in reader.layers]
            return reader.sha256, reader.header, len(values)

    good = profile.read_bytes()
    require_named_or_equal(profile, good, damaged(good, *damage), read)


@BOUNDED
@given(damage=DAMAGE)
def test_a_manifest(bundle: Path, damage: tuple[str, float, int]) -> None:
    def read() -> object:
        with BundleReader.open(bundle) as reader:
            form = reader.forms[0]
            out = torch.empty(form.record_size_bytes, dtype=torch.uint8)
            for layer, expert in samples.ORDER:
                reader.read_record_into(layer, expert, out, form=form.index)
            return form.form.layout, reader.manifest

    path = bundle / "manifest.json"
    good = path.read_bytes()
    require_named_or_equal(path, good, damaged(good, *damage), read)


@BOUNDED
@given(damage=DAMAGE)
def test_a_buddy_map(buddies: Path, damage: tuple[str, float, int]) -> None:
    good = buddies.read_bytes()

    def read() -> object:
        return read_json_artifact(buddies, BuddyMap)

    require_named_or_equal(buddies, good, damaged(good, *damage), read)


@BOUNDED
@given(damage=DAMAGE)
def test_a_safetensors_header_never_ends_in_a_raw_exception(
    bundle: Path, damage: tuple[str, float, int]
) -> None:
    """Renaming a tensor is valid in itself; the model's tensor map finds it missing."""
    path = bundle / "skeleton-00001.safetensors"
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    end = length if damage[0] == "cut" else len(good[:length].rstrip())
    path.write_bytes(damaged(good[:end], *damage) + (b"" if damage[0] == "cut" else good[end:]))
    try:
        with Checkpoint.open_files([path]) as checkpoint:
            for name, info in checkpoint.tensors.items():
                assert len(checkpoint.read_bytes(name)) == info.size_bytes
    except MoeToolError as error:
        assert error.exit_code == 3 and error.hint and "\n" not in error.message
    finally:
        path.write_bytes(good)
