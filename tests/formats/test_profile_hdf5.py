"""Profiles: what was measured comes back, the same input gives the same bytes."""

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.router_trace import LayerTrace
from moe_tool.artifacts.skeleton_facts import LinearCount, SkeletonFacts
from moe_tool.errors import DiskFullError
from moe_tool.formats import profile_hdf5
from moe_tool.formats.profile_hdf5 import (
    ProfileReader,
    write_layer_part,
    write_profile,
)
from tests.formats import samples
from tests.formats.hostile.damage import hdf5_changed


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
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(0, 3), scored=st.booleans())
def test_a_part_comes_back(tmp_path: Path, seed: int, depth: int, scored: bool) -> None:
    trace = samples.trace(depth, seed)
    if scored:
        trace = dataclasses.replace(trace, selection_score=-trace.router_logits)
    statistics = samples.statistics(seed)
    write_layer_part(tmp_path / "part.h5", 5, trace, statistics)
    with h5py.File(tmp_path / "part.h5") as file:
        layer = file["layers/5"]
        names = [field.name for field in dataclasses.fields(LayerTrace)]
        found_trace = LayerTrace(**{n: layer[n][()] if n in layer else None for n in names})
        found_statistics = profile_hdf5._read_statistics(layer, tmp_path)
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


def test_a_profile_from_before_there_were_skeleton_facts_opens(tmp_path: Path) -> None:
    path = samples.make_profile(tmp_path / "p.h5")

    def forget(file: h5py.File) -> None:
        header = json.loads(file.attrs["header"])
        assert header.pop("skeleton") is None
        file.attrs["header"] = json.dumps(header)

    hdf5_changed(forget)(path)
    with ProfileReader.open(path) as reader:
        assert reader.header == samples.header()


def test_skeleton_facts_come_back_with_the_longest_config_there_may_be(tmp_path: Path) -> None:
    """A header of a megabyte: far beyond what HDF5 keeps beside an object."""
    facts = SkeletonFacts(
        native_bytes=100,
        linear_native_bytes=64,
        largest_tensor_bytes=64,
        linears=(LinearCount(n_outputs=4, n_inputs=4, count=2),),
        tied_head_weights=16,
        config_json='"' * 2**20,
    )
    header = samples.header().model_copy(update={"skeleton": facts})
    parts = {}
    for position, layer in enumerate(samples.LAYERS):
        parts[layer] = tmp_path / f"{layer}.part.h5"
        trace = samples.trace(len(samples.LAYERS) - 1 - position, layer)
        write_layer_part(parts[layer], layer, trace, samples.statistics(layer))
    sensitivities = dict.fromkeys(samples.LAYERS, 0.5)
    write_profile(
        tmp_path / "p.h5", header, samples.tokens(), parts, sensitivities, sensitivity_n_tokens=8
    )
    with ProfileReader.open(tmp_path / "p.h5") as reader:
        assert reader.header.skeleton == facts
