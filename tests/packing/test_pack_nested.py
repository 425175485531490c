"""Nested experts: one record that two precisions are read from."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.policies.eviction import Lru
from moe_tool.profiling.recorder import record_profile
from moe_tool.quantization.round_to_nearest import dequantize, round_trip
from moe_tool.quantization.weights import IntegerWeight
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.store.record_store import RecordStore
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle

BASE = 1


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint("gpt_oss"), name="tiny")  # it has biases


@pytest.fixture(scope="module")
def profile(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "p.h5"
    record_profile(model, parse_sources(["builtin"]), out=out, tokens=1024, seq_len=32)
    return out


@pytest.fixture(scope="module")
def bundle(model: LocatedModel, profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    report = pack_bundle(model, out=out, bits="2+2", profile=profile)
    assert report.replica_bytes == 0  # nothing is there twice
    return out


def _record(reader: BundleReader, layer: int, expert: int, level: int) -> torch.Tensor:
    record = torch.empty(reader.forms[level].record_size_bytes, dtype=torch.uint8)
    reader.read_record_into(layer, expert, record, form=level)
    return record


def test_a_record_begins_with_the_record_of_its_base(bundle: Path, model: LocatedModel) -> None:
    opened = open_model(model)
    with opened.checkpoint, BundleReader.open(bundle) as reader:
        assert [held.table.name for held in reader.forms] == ["2+2", "2of4"]
        reader.verify_all()
        entry = reader.forms[BASE].table.records[3]
        layer, expert = entry.layer, entry.expert
        whole, first = (_record(reader, layer, expert, level) for level in (0, BASE))
        assert torch.equal(whole[: len(first)], first)
        exact = opened.experts.read(layer, expert)
        for name, found in reader.forms[0].form.decode(whole).items():
            base = reader.forms[BASE].form.decode(first)[name]
            if not isinstance(found, IntegerWeight):
                assert torch.equal(found.values, exact[name])
                assert torch.equal(base.values, exact[name])
                continue
            assert isinstance(base, IntegerWeight)
            assert torch.equal(dequantize(found), round_trip(exact[name], 4))
            assert torch.equal(dequantize(base), dequantize(found.base))


def test_it_is_smaller_than_two_copies_and_priced_in_both_forms(
    bundle: Path, model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    two = pack_bundle(model, out=tmp_path / "two", bits="4", replicas="2", profile=profile)
    nested = BundleReader.open(bundle).manifest
    copies = BundleReader.open(tmp_path / "two").manifest
    assert nested.primary_bytes < two.expert_bytes + two.replica_bytes
    for ours, theirs in zip(nested.forms, copies.forms, strict=True):
        found, wanted = (np.mean([r.eps for r in table.records]) for table in (ours, theirs))
        assert found < 1.1 * wanted


def test_an_expert_whose_base_is_there_is_read_from_where_it_ends(bundle: Path) -> None:
    with BundleReader.open(bundle) as reader:
        own, base = (reader.forms[level].record_size_bytes for level in (0, BASE))
        layer = reader.manifest.shape.layers[0]
        bases = RecordStore(reader, form=BASE, n_slots=1, pinned=[(layer, 1)], eviction=Lru)
        store = RecordStore(reader, form=0, n_slots=3, eviction=Lru, base=bases)
        bases.load_pinned()
        counters = PhaseCounters()
        for expert, weights in store.acquire(layer, [0, 1], counters):
            expected = reader.forms[0].form.decode(_record(reader, layer, expert, 0))
            for name, found in weights.items():
                if isinstance(found, IntegerWeight):
                    assert torch.equal(dequantize(found), dequantize(expected[name]))
        assert counters.bytes_read == own + (own - base)
        store.prefetch(layer, [], spare=[], counters=counters)
        store.close()
        bases.close()


def test_prefetching_over_a_base_counts_what_it_reads(bundle: Path) -> None:
    with BundleReader.open(bundle) as reader:
        own, base = (reader.forms[level].record_size_bytes for level in (0, BASE))
        layer = reader.manifest.shape.layers[0]
        bases = RecordStore(reader, form=BASE, n_slots=1, pinned=[(layer, 1)], eviction=Lru)
        store = RecordStore(reader, form=0, n_slots=3, eviction=Lru, base=bases)
        bases.load_pinned()
        counters = PhaseCounters()
        list(store.acquire(layer, [0], counters))
        store.prefetch(layer, [1], spare=[], counters=counters)
        list(store.acquire(layer, [1], counters))
        list(store.acquire(layer, [1], counters))
        assert counters.bytes_read == own + (own - base)
        store.close()
        bases.close()


def test_a_damaged_refinement_is_found_although_only_it_is_read(
    bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "b"
    copy.mkdir()
    for path in bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with BundleReader.open(copy) as reader:
        entry = reader.forms[0].table.records[0]
        base = reader.forms[BASE].record_size_bytes
    data = bytearray((copy / entry.file).read_bytes())
    data[entry.offset + base + 5] ^= 1
    (copy / entry.file).write_bytes(data)
    with BundleReader.open(copy) as reader:
        key = (entry.layer, entry.expert)
        bases = RecordStore(reader, form=BASE, n_slots=1, pinned=[key], eviction=Lru)
        store = RecordStore(reader, form=0, n_slots=3, eviction=Lru, base=bases)
        bases.load_pinned()  # the base is whole
        with pytest.raises(CorruptArtifactError, match=f"expert {entry.expert}"):
            list(store.acquire(entry.layer, [entry.expert], PhaseCounters()))
        store.close()
        bases.close()


@pytest.mark.parametrize("policy", ["exact", "replica"])
def test_text_is_that_of_two_copies(
    policy: str, bundle: Path, model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    """Exactly where the experts answer; with bases in their place something else comes out."""

    def text(folder: Path, policy: str, memory: str) -> tuple[list[int], int]:
        with open_session(folder, run_options(memory=memory, policy=policy, context=64)) as session:
            options = GenerateOptions(max_tokens=12, ignore_eos=True)
            result = generate_ids(session, [[256, 84, 104]], options)
            return list(result.token_ids[0]), session.runner.stats.decode.replica_answers

    resident, _ = text(bundle, "exact", "100%")
    found, n_lowered = text(bundle, policy, "40%")
    if policy == "exact":
        assert found == resident and n_lowered == 0
        pack_bundle(model, out=tmp_path / "plain", bits="4", profile=profile)
        assert text(tmp_path / "plain", "exact", "100%")[0] == found
    else:
        assert n_lowered > 0


@pytest.mark.parametrize("after", [1, 9])
def test_an_interrupted_pack_resumes_to_the_same_bytes(
    after: int,
    bundle: Path,
    model: LocatedModel,
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = BundleWriter.write_record

    def killing(self: BundleWriter, *args: object, **kwargs: object) -> None:
        if self.n_written == after:
            raise KeyboardInterrupt
        write(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(BundleWriter, "write_record", killing)
    with pytest.raises(KeyboardInterrupt):
        pack_bundle(model, out=tmp_path / "b", bits="2+2", profile=profile)
    monkeypatch.undo()
    pack_bundle(model, out=tmp_path / "b", bits="2+2", profile=profile)
    for path in sorted(bundle.iterdir()):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantizer": "hqq"}, "zero points"),
        ({"replicas": "4"}, "no expert has more bits"),
        ({"skeleton_bits": "2+2", "bits": "4"}, "only experts are nested"),
        ({"bits": "2+3"}, "not known"),
        ({"bits": "4", "replicas": "2+2"}, "not known"),
    ],
)
def test_what_cannot_be_nested_is_refused(
    options: dict[str, str], says: str, model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        pack_bundle(model, out=tmp_path / "b", profile=profile, **{"bits": "2+2", **options})


def test_nested_experts_need_a_profile(model: LocatedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no profile"):
        pack_bundle(model, out=tmp_path / "b", bits="2+2")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["forms"][1]["records"][0].update(offset=8192), "do not lie"),
        (lambda m: m["forms"][1]["records"].pop(), "do not lie"),
        (lambda m: m["forms"][1]["precision"].update(group=32), "go together"),
        (lambda m: m["forms"][1]["precision"].update(of_bits=3), "go together"),
        (lambda m: m["forms"][0]["precision"].update(base_bits=None), "go together"),
        (lambda m: m["forms"][0]["precision"].update(zeros=True), "without zero points"),
    ],
)
def test_a_forged_base_is_refused(
    change: Callable[[dict], object], says: str, bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "b"
    copy.mkdir()
    for path in bundle.iterdir():
        os.link(path, copy / path.name) if path.name != "manifest.json" else None
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    del manifest["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtifactError, match=says):
        BundleReader.open(copy)


def test_the_hash_of_a_base_is_its_own(bundle: Path) -> None:
    with BundleReader.open(bundle) as reader:
        for own, base in zip(
            reader.forms[0].table.records, reader.forms[BASE].table.records, strict=True
        ):
            first = _record(reader, own.layer, own.expert, BASE)
            assert base.xxh3 == xxhash.xxh3_64_hexdigest(first.numpy().data) != own.xxh3
