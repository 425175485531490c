"""The store over a bundle on disk: the weights that were packed, and a damaged record."""

import os

import numpy as np
import pytest
import torch

from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import precision_from_bits
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import CorruptArtifactError, StorageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.policies.eviction import Lru
from moe_tool.quantization.round_to_nearest import dequantize, round_trip
from moe_tool.quantization.weights import IntegerWeight
from moe_tool.store.expert_store import ExpertStore

LAYERS, EXPERTS = (1, 3), 4
SHAPE = MoeShape(
    model_type="mixtral",
    n_decoder_layers=4,
    layers=LAYERS,
    experts=EXPERTS,
    top_k=2,
    hidden=72,
    vocabulary=11,
    dtype="bfloat16",
    expert_tensors=(
        ExpertTensor(name="gate_up_proj", shape=(10, 72)),
        ExpertTensor(name="gate_up_proj_bias", shape=(10,)),
        ExpertTensor(name="down_proj", shape=(72, 5)),
    ),
)


def _expert(layer, expert):
    generator = torch.Generator().manual_seed(100 * layer + expert)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(torch.bfloat16)
        for tensor in SHAPE.expert_tensors
    }


@pytest.fixture(params=["native", "8", "4"])
def bundle(request, tmp_path):
    precision = precision_from_bits(request.param)
    order = [(layer, expert) for layer in LAYERS for expert in (2, 0, 3, 1)]
    writer = BundleWriter.open(
        tmp_path / "bundle",
        identity=ModelIdentity(name="tiny", model_type="mixtral", quick="0" * 64),
        shape=SHAPE,
        precision=precision,
        order=order,
        made_from={},
    )
    for layer, expert in order:
        record = writer.forms[0].encode(_expert(layer, expert))
        writer.write_record(0, layer, expert, record)
    writer.finish(heat=None, buddies=None, profile_sha256=None)
    with BundleReader.open(tmp_path / "bundle") as reader:
        yield reader


def _require_right(weights, layer, expert, precision):
    for name, packed in _expert(layer, expert).items():
        found = weights[name]
        if isinstance(found, IntegerWeight):
            expected = round_trip(packed.float(), precision.width_bits)
            assert torch.equal(dequantize(found), expected)
        else:
            assert torch.equal(found.values, packed)


@pytest.mark.parametrize("n_slots", [1, 3, 8])
def test_every_expert_arrives_as_it_was_packed(bundle, n_slots):
    store = ExpertStore(bundle, n_slots=n_slots, eviction=Lru)
    counters = PhaseCounters()
    for layer in (1, 3, 1):
        for expert, weights in store.acquire(layer, range(EXPERTS), counters):
            _require_right(weights, layer, expert, bundle.manifest.precision)
    assert counters.hits == (4 if n_slots == 8 else 0)
    assert counters.bytes_read == counters.misses * bundle.layout.size_bytes
    store.close()


def test_a_flipped_bit_is_named_and_the_other_experts_still_come(bundle):
    entry = bundle.record_entry(3, 2)
    path = bundle.folder / entry.file
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(entry.offset + 17)
        value = file.read(1)[0]
        file.seek(entry.offset + 17)
        file.write(bytes([value ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a bit that fell over by itself
    store = ExpertStore(bundle, n_slots=2, eviction=Lru)
    with pytest.raises(CorruptArtifactError, match="layer 3 expert 2") as error:
        for _ in store.acquire(3, range(EXPERTS), PhaseCounters()):
            pass
    assert entry.file in error.value.message
    assert not store.resident(3)[2]
    for expert, weights in store.acquire(3, [0, 1, 3], PhaseCounters()):
        _require_right(weights, 3, expert, bundle.manifest.precision)
    store.close()


def test_a_file_written_to_while_the_store_is_open_is_named(bundle):
    entry = bundle.record_entry(1, 3)
    store = ExpertStore(bundle, n_slots=2, eviction=Lru)
    os.utime(bundle.folder / entry.file, ns=(0, 1))
    with pytest.raises(CorruptArtifactError, match="changed after the bundle was opened") as error:
        list(store.acquire(1, [3], PhaseCounters()))
    assert f"layer 1 expert 3 in {bundle.folder / entry.file}" in error.value.message
    assert not store.resident(1).any()
    store.close()


def test_a_read_that_fails_reaches_the_caller_with_its_name(bundle, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    entry = bundle.record_entry(3, 0)
    store = ExpertStore(bundle, n_slots=2, eviction=Lru)
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match=r"layer 3 expert 0 .*Input/output error") as error:
            list(store.acquire(3, [0], PhaseCounters()))
    assert entry.file in error.value.message
    assert [expert for expert, _ in store.acquire(3, [0], PhaseCounters())] == [0]
    store.close()


def test_a_file_that_ends_too_early_is_named(bundle, monkeypatch):
    whole = os.preadv
    entry = bundle.record_entry(3, 1)
    end = entry.offset + 100

    def end_early(handle, buffers, offset):
        n_left = max(0, end - offset)
        return whole(handle, [buffers[0][:n_left]], offset) if n_left else 0

    store = ExpertStore(bundle, n_slots=2, eviction=Lru)
    monkeypatch.setattr(os, "preadv", end_early)
    with pytest.raises(StorageError, match="layer 3 expert 1 .*ended after 100 of") as error:
        list(store.acquire(3, [1], PhaseCounters()))
    assert entry.file in error.value.message
    assert not store.resident(3).any()
    store.close()


def test_a_prefetch_that_fails_is_named_by_the_call_that_wants_it(bundle, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    store, counters = ExpertStore(bundle, n_slots=4, eviction=Lru), PhaseCounters()
    list(store.acquire(1, [0], counters))
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fail)
        store.prefetch(3, [2], spare=[2], counters=counters)
        with pytest.raises(StorageError, match=r"layer 3 expert 2 .*Input/output error"):
            list(store.acquire(3, [2], counters))
    assert not store.resident(3).any()
    store.prefetch(3, [2], spare=[2], counters=counters)
    for expert, weights in store.acquire(3, [2], counters):
        _require_right(weights, 3, expert, bundle.manifest.precision)
    assert counters.prefetched_bytes == bundle.layout.size_bytes
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
    store = ExpertStore(bundle, n_slots=1, eviction=Lru)
    came = []
    for expert, weights in store.acquire(1, [2, 0], PhaseCounters()):
        _require_right(weights, 1, expert, bundle.manifest.precision)
        came.append(expert)
    slot = store._slots.view(0)
    assert came == [2, 0]
    assert places == [(slot.data_ptr(), slot.numel())] * 2  # one read per record
    store.close()
