"""Profiles: what was measured comes back, the same input gives the same bytes."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_tool.errors import CorruptArtifactError, DiskFullError
from moe_tool.formats.profile_hdf5 import ProfileReader, read_layer_part, write_layer_part
from tests.formats import samples


def same(found, wanted) -> bool:
    if dataclasses.is_dataclass(wanted):
        names = [field.name for field in dataclasses.fields(wanted)]
        return all(same(getattr(found, name), getattr(wanted, name)) for name in names)
    if isinstance(wanted, np.ndarray):
        return found.dtype == wanted.dtype and np.array_equal(found, wanted)
    return type(found) is type(wanted) and found == wanted


def test_what_was_measured_comes_back(tmp_path: Path) -> None:
    with ProfileReader.open(samples.make_profile(tmp_path / "p.h5")) as reader:
        assert reader.header == samples.header()
        assert reader.layers == samples.LAYERS
        assert same(reader.tokens, samples.tokens())
        assert same(reader.trace(0), samples.trace(1, 0))
        assert same(reader.trace(2), samples.trace(0, 2))
        wanted = dataclasses.replace(samples.statistics(2), sensitivity=0.5, sensitivity_n_tokens=8)
        assert same(reader.statistics(2), wanted)


def test_the_same_measurements_give_the_same_bytes(tmp_path: Path) -> None:
    first = samples.make_profile(tmp_path / "a.h5").read_bytes()
    assert samples.make_profile(tmp_path / "b.h5").read_bytes() == first


def test_the_hash_is_that_of_the_whole_file(tmp_path: Path) -> None:
    import hashlib

    path = samples.make_profile(tmp_path / "p.h5")
    with ProfileReader.open(path) as reader:
        assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_any_hdf5_program_can_read_it(tmp_path: Path) -> None:
    with h5py.File(samples.make_profile(tmp_path / "p.h5")) as file:
        assert file["layers/2/top_k_index"].shape == (8, 2)
        assert file.attrs["kind"] == "profile"


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(0, 3), scored=st.booleans())
def test_a_part_comes_back(tmp_path: Path, seed: int, depth: int, scored: bool) -> None:
    trace = samples.trace(depth, seed)
    if scored:
        trace = dataclasses.replace(trace, selection_score=-trace.router_logits)
    statistics = samples.statistics(seed)
    write_layer_part(tmp_path / "part.h5", 5, trace, statistics)
    found_trace, found_statistics = read_layer_part(tmp_path / "part.h5", 5)
    assert same(found_trace, trace) and same(found_statistics, statistics)


def test_a_profile_of_many_layers_can_be_written(tmp_path: Path) -> None:
    """HDF5 reads back its own structures once there are many."""
    from moe_tool.formats.hostile_hdf5 import created_hdf5

    with created_hdf5(tmp_path / "many.h5") as file:
        for number in range(3000):
            file.create_dataset(f"{number % 60}/{number}", data=[0.0], track_times=False)
        file["7/7"][()] = 1.0
    with h5py.File(tmp_path / "many.h5") as file:
        assert file["7/7"][0] == 1.0


@pytest.mark.parametrize("after", [0, 3, 8, 12])
def test_a_full_disk_is_called_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    import errno

    from moe_tool.formats import hostile_hdf5

    class Full(hostile_hdf5._Guarded):
        n_writes = 0

        def __init__(self, raw) -> None:
            class Raw:
                def __getattr__(_, name):
                    return getattr(raw, name)

                def write(_, data):
                    Full.n_writes += 1
                    if Full.n_writes > after:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return raw.write(data)

            super().__init__(Raw())

    Full.n_writes = 0
    monkeypatch.setattr(hostile_hdf5, "_Guarded", Full)
    with pytest.raises(DiskFullError) as error:
        write_layer_part(tmp_path / "part.h5", 0, samples.trace(1), samples.statistics())
    assert error.value.exit_code == 4 and "part.h5" in error.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_layer_is_refused(tmp_path: Path) -> None:
    write_layer_part(tmp_path / "part.h5", 5, samples.trace(1), samples.statistics())
    with pytest.raises(CorruptArtifactError, match="layers/6 is missing"):
        read_layer_part(tmp_path / "part.h5", 6)
