"""Damaged and forged traces of runs are refused by name."""

import tracemalloc

import h5py
import numpy as np
import pytest

from moe_tool.artifacts.precision import NativePrecision
from moe_tool.artifacts.run_trace import RecordedCalls, RunTraceHeader
from moe_tool.errors import ArtifactVersionError, CorruptArtifactError, MoeToolError
from moe_tool.formats.record_form import record_form
from moe_tool.formats.run_trace_hdf5 import read_run_trace, write_run_trace
from tests.formats import samples
from tests.formats.hostile.damage import hdf5_changed

HEADER = RunTraceHeader(
    identity=samples.IDENTITY,
    shape=samples.SHAPE,
    precision=NativePrecision(),
    record_size_bytes=record_form(samples.SHAPE, NativePrecision()).layout.size_bytes,
    skeleton_precision=NativePrecision(),
    matrix_bytes=10,
    n_matrices=1,
    threads=1,
    n_slots=3,
    pinned=((2, 1),),
    eviction="lru",
    prefetch="none",
    n_calls_before=0,
    prompt_tokens=1,
    decode_tokens=1,
    decode_seconds=0.5,
    hits=1,
    misses=2,
    prefetches=0,
    prefetch_hits=0,
    prompt_hits=0,
    prompt_misses=1,
    stall_seconds=0.25,
    tool_version="0",
)
CALLS = RecordedCalls(
    layer=np.array([0, 1], np.int32),
    is_decode=np.array([False, True]),
    start=np.array([0, 2, 3], np.int64),
    keys=np.array([0, 2, 4], np.int32),
    guess_start=np.array([0, 1, 1], np.int64),
    guesses=np.array([5], np.int32),
    scores=np.zeros((2, 3), np.uint16),
)


@pytest.fixture
def path(tmp_path):
    write_run_trace(tmp_path / "run.h5", HEADER, CALLS)
    return tmp_path / "run.h5"


def test_a_trace_comes_back_and_repeats_byte_for_byte(path, tmp_path):
    header, calls = read_run_trace(path)
    assert header == HEADER
    for name in RecordedCalls.__dataclass_fields__:
        assert (getattr(calls, name) == getattr(CALLS, name)).all()
    write_run_trace(tmp_path / "again.h5", HEADER, CALLS)
    assert (tmp_path / "again.h5").read_bytes() == path.read_bytes()


def test_scores_may_be_missing(path, tmp_path):
    def change(file: h5py.File) -> None:
        del file["scores"]

    hdf5_changed(change)(path)
    assert read_run_trace(path)[1].scores is None


def _put(name, value):
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=value)

    return change


def _attribute(name, value):
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


def _header(**changed):
    return _attribute("header", HEADER.model_copy(update=changed).model_dump_json())


def _shape(**changed):
    return samples.SHAPE.model_copy(update=changed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_put("layer", np.array([0, 2], np.int32)), "layer does not exist"),
        (_put("layer", np.array([0, -1], np.int32)), "layer does not exist"),
        (_put("layer", np.array([0.0, 1.0])), "float64"),
        (_put("is_decode", np.array([True])), "phase"),
        (_put("start", np.array([0, 2], np.int64)), "beginnings"),
        (_put("start", np.array([0, 4, 3], np.int64)), "add up"),
        (_put("start", np.array([1, 2, 3], np.int64)), "add up"),
        (_put("keys", np.array([0, 2, 6], np.int32)), "expert does not exist"),
        (_put("keys", np.array([0, 2, 1], np.int32)), "another layer"),
        (_put("keys", np.array([2, 2, 4], np.int32)), "twice"),
        (_put("guesses", np.array([1], np.int32)), "later layer"),
        (_put("scores", np.zeros((2, 2), np.uint16)), "shape"),
        (_attribute("kind", "profile"), "not the trace"),
        (_attribute("header", "{}"), "header"),
        (_header(pinned=((1, 0),)), "a pinned expert does not exist"),
        (_header(pinned=((2, 1), (2, 1))), "pinned twice"),
        (_header(pinned=((0, 0), (0, 1), (2, 1))), "leave none of 3 slots free"),
        (_header(n_slots=2), "6 experts do not run in 2 slots"),
        (_header(n_slots=2**31), "slots"),
        (_header(n_slots=3, pinned=((2, 1), (0, 0)), eviction="lru:per-layer"), "one for each"),
        (_header(eviction="evil"), "eviction"),
        (_header(eviction="lfu:halve-every=1000001"), "eviction"),
        (_header(eviction=f"lfu:halve-every={'9' * 5000}"), "eviction"),
        (_header(prefetch="evil"), "prefetch"),
        (_header(record_size_bytes=1), "a record has 1 bytes"),
        (_header(threads=2**31), "threads"),
        (_header(decode_seconds=1e300), "decode_seconds"),
        (_header(n_calls_before=3), "more calls than it has"),
        (_header(shape=_shape(experts=2**28)), "536870912 experts"),
        (_header(shape=_shape(layers=tuple(range(513)), n_decoder_layers=513)), "513 layers"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(path, change, says):
    hdf5_changed(change)(path)
    with pytest.raises(CorruptArtifactError, match=says) as error:
        read_run_trace(path)
    assert error.value.hint and "\n" not in error.value.message


def test_another_version_is_refused(path):
    hdf5_changed(_attribute("format_version", 99))(path)
    with pytest.raises(ArtifactVersionError):
        read_run_trace(path)


def test_no_flipped_bit_goes_unnoticed(path):
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[at] ^= 4
        path.write_bytes(bytes(damaged))
        with pytest.raises(MoeToolError):
            read_run_trace(path)


def test_every_expert_may_be_pinned(tmp_path):
    everyone = tuple((layer, expert) for layer in samples.LAYERS for expert in range(3))
    header = HEADER.model_copy(update={"n_slots": 6, "pinned": everyone})
    write_run_trace(tmp_path / "run.h5", header, CALLS)
    assert read_run_trace(tmp_path / "run.h5")[0] == header


def test_experts_that_the_file_does_not_hold_are_refused_before_anything_is_laid_out(path):
    def change(file: h5py.File) -> None:
        del file["scores"]
        file.create_dataset("scores", data=np.zeros((0, 2**28), np.uint16))
        _header(shape=_shape(experts=2**28))(file)

    hdf5_changed(change)(path)
    tracemalloc.start()
    with pytest.raises(CorruptArtifactError, match="experts"):
        read_run_trace(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
