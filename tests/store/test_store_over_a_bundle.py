"""The store over a bundle on disk: the weights that were packed, and a damaged record."""

import os

import numpy as np
import pytest
import torch

from moe_tool.artifacts.precision import precision_from_bits
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import CorruptArtifactError, StorageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.record_form import record_form
from moe_tool.packing.expert_coding import coded
from moe_tool.policies.eviction import Lru
from moe_tool.quantization.round_to_nearest import dequantize, round_trip
from moe_tool.quantization.weights import IntegerWeight
from moe_tool.store.record_store import RecordStore
from tests.formats.small_bundle import ORDER, SHAPE, expert_weights, open_writer

EXPERTS = SHAPE.experts


@pytest.fixture(params=["native", "8", "4"])
def bundle(request, tmp_path):
    precision = precision_from_bits(request.param)
    writer = open_writer(tmp_path / "bundle", bits=request.param)
    for layer, expert in ORDER:
        weights = coded(expert_weights(layer, expert), precision)
        writer.write_record(0, layer, expert, record_form(SHAPE, precision).encode(weights))
    writer.finish(heat=None, buddies=None, profile_sha256=None)
    with BundleReader.open(tmp_path / "bundle") as reader:
        yield reader


def _require_right(weights, layer, expert, precision):
    for name, packed in expert_weights(layer, expert).items():
        found = weights[name]
        if isinstance(found, IntegerWeight):
            expected = round_trip(packed.float(), precision.width_bits)
            assert torch.equal(dequantize(found), expected)
        else:
            assert torch.equal(found.values, packed)


@pytest.mark.parametrize("n_slots", [1, 3, 8])
def test_every_expert_arrives_as_it_was_packed(bundle, n_slots):
    store = RecordStore(bundle, form=0, n_slots=n_slots, eviction=Lru)
    counters = PhaseCounters()
    for layer in (1, 3, 1):
        for expert, weights in store.acquire(layer, range(EXPERTS), counters):
            _require_right(weights, layer, expert, bundle.manifest.primaries[0].precision)
    assert counters.hits == (4 if n_slots == 8 else 0)
    assert counters.bytes_read == counters.misses * bundle.forms[0].record_size_bytes
    store.close()


def test_a_flipped_bit_is_named_and_the_other_experts_still_come(bundle):
    entry = bundle.record_entry(3, 2, form=0)
    path = bundle.folder / entry.file
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(entry.offset + 17)
        value = file.read(1)[0]
        file.seek(entry.offset + 17)
        file.write(bytes([value ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a bit that fell over by itself
    store = RecordStore(bundle, form=0, n_slots=2, eviction=Lru)
    with pytest.raises(CorruptArtifactError, match="layer 3 expert 2") as error:
        for _ in store.acquire(3, range(EXPERTS), PhaseCounters()):
            pass
    assert entry.file in error.value.message
    assert not store.resident(3)[0][2]
    for expert, weights in store.acquire(3, [0, 1, 3], PhaseCounters()):
        _require_right(weights, 3, expert, bundle.manifest.primaries[0].precision)
    store.close()


def test_a_file_written_to_while_the_store_is_open_is_named(bundle):
    entry = bundle.record_entry(1, 3, form=0)
    store = RecordStore(bundle, form=0, n_slots=2, eviction=Lru)
    os.utime(bundle.folder / entry.file, ns=(0, 1))
    with pytest.raises(CorruptArtifactError, match="changed after the bundle was opened") as error:
        list(store.acquire(1, [3], PhaseCounters()))
    assert f"layer 1 expert 3 in {bundle.folder / entry.file}" in error.value.message
    assert not store.resident(1)[0].any()
    store.close()


def test_a_read_that_fails_reaches_the_caller_with_its_name(bundle, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    entry = bundle.record_entry(3, 0, form=0)
    store = RecordStore(bundle, form=0, n_slots=2, eviction=Lru)
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match=r"layer 3 expert 0 .*Input/output error") as error:
            list(store.acquire(3, [0], PhaseCounters()))
    assert entry.file in error.value.message
    assert [expert for expert, _ in store.acquire(3, [0], PhaseCounters())] == [0]
    store.close()


def test_a_file_that_ends_too_early_is_named(bundle, monkeypatch):
    whole = os.preadv
    entry = bundle.record_entry(3, 1, form=0)
    end = entry.offset + 100

    def end_early(handle, buffers, offset):
        n_left = max(0, end - offset)
        return whole(handle, [buffers[0][:n_left]], offset) if n_left else 0

    store = RecordStore(bundle, form=0, n_slots=2, eviction=Lru)
    monkeypatch.setattr(os, "preadv", end_early)
    with pytest.raises(StorageError, match="layer 3 expert 1 .*ended after 100 of") as error:
        list(store.acquire(3, [1], PhaseCounters()))
    assert entry.file in error.value.message
    assert not store.resident(3)[0].any()
    store.close()


def test_a_prefetch_that_fails_is_named_by_the_call_that_wants_it(bundle, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    store, counters = RecordStore(bundle, form=0, n_slots=4, eviction=Lru), PhaseCounters()
    list(store.acquire(1, [0], counters))
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fail)
        store.prefetch(3, [2], spare=[2], counters=counters)
        with pytest.raises(StorageError, match=r"layer 3 expert 2 .*Input/output error"):
            list(store.acquire(3, [2], counters))
    assert not store.resident(3)[0].any()
    store.prefetch(3, [2], spare=[2], counters=counters)
    for expert, weights in store.acquire(3, [2], counters):
        _require_right(weights, 3, expert, bundle.manifest.primaries[0].precision)
    assert counters.prefetched_bytes == bundle.forms[0].record_size_bytes
    store.close()


def test_slots_take_direct_reads_without_a_copy(bundle, monkeypatch):
    refusal = bundle.read_directly()
    if refusal is not None:
        pytest.skip(refusal)
    places, whole = [], os.preadv

    def watch(handle, buffers, offset):
        places.append((np.frombuffer(buffers[0], dtype=np.uint8).ctypes.data, len(buffers[0])))
        return whole(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", watch)
    store = RecordStore(bundle, form=0, n_slots=1, eviction=Lru)
    came = []
    for expert, weights in store.acquire(1, [2, 0], PhaseCounters()):
        _require_right(weights, 1, expert, bundle.manifest.primaries[0].precision)
        came.append(expert)
    slot = store._slots.view(0)
    assert came == [2, 0]
    assert places == [(slot.data_ptr(), slot.numel())] * 2  # one read per record
    store.close()
