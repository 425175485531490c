"""Experts in channels in a bundle: what is there, what it is worth, resumes, refusals, damage."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from moe_tool.artifacts.precision import channel_precision
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.experts.channel_forward import (
    channel_gate,
    channel_sizes,
    choose_channels,
    selector_values,
    split_halves,
)
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.experts.gate import gate_output
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.calibrated_layers import CalibratedModel
from moe_tool.policies.eviction import Lru
from moe_tool.profiling.recorder import record_profile
from moe_tool.quantization.channels import (
    ChannelExpert,
    ChosenChannels,
    Selector,
    dequantize_channels,
)
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.store.channel_store import ChannelStore
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle

ARCHITECTURES = {"mixtral": "gate2", "gpt_oss": "up3:8:32"}
"""gpt_oss has biases, and rows of gate and up alternate"""


def the_model(tiny_checkpoint: Callable[..., Path], arch: str) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint(arch), name=arch)


def the_profile(model: LocatedModel, folder: Path) -> Path:
    out = folder / "p.h5"
    record_profile(model, parse_sources(["builtin"]), out=out, tokens=1024, seq_len=32)
    return out


@pytest.fixture(scope="module", params=ARCHITECTURES)
def packed(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[LocatedModel, Path, Path]:
    """The model, its profile, its bundle."""
    model = the_model(tiny_checkpoint, request.param)
    folder = tmp_path_factory.mktemp("channels")
    profile = the_profile(model, folder)
    sparse = ARCHITECTURES[request.param]
    pack_bundle(model, out=folder / "b", sparse_experts=sparse, profile=profile)
    return model, profile, folder / "b"


def read_expert(reader: BundleReader, layer: int, expert: int) -> ChannelExpert:
    found = []
    for level in (0, 1):
        record = torch.empty(reader.forms[level].record_size_bytes, dtype=torch.uint8)
        reader.read_record_into(layer, expert, record, form=level)
        found.append(record)
    weights = reader.forms[0].form.decode(found[0])
    assert isinstance(weights, ChannelExpert)
    weights.selector = reader.forms[1].form.decode(found[1])
    return weights


def selector_of(weights: ChannelExpert) -> Selector:
    assert weights.selector is not None
    return weights.selector


def test_an_expert_is_what_its_parts_say_and_near_the_checkpoint(
    packed: tuple[LocatedModel, Path, Path],
) -> None:
    model, profile, bundle = packed
    opened = open_model(model)
    with opened.checkpoint, BundleReader.open(bundle) as reader, ProfileReader.open(profile) as p:
        reader.verify_all()
        for layer in CalibratedModel(model.folder, opened, p.tokens).layers():
            weights = read_expert(reader, layer.layer, 1)
            exact = {name: weight.values for name, weight in layer.experts[1].items()}
            selector = selector_of(weights)
            rows, columns = dequantize_channels(weights.channels)
            choosing = dequantize(selector.weight)
            gate = channel_gate(layer.module)
            exact_halves = split_halves(gate, exact["gate_up_proj"])
            chosen_half, other_half = exact_halves if selector.is_gate else exact_halves[::-1]
            assert (rows - other_half).abs().max() < 0.2 * other_half.abs().max()
            assert (columns.T - exact["down_proj"]).abs().max() < 0.2
            assert torch.nn.functional.cosine_similarity(choosing, chosen_half).mean() > 0.85
            x = layer.inputs[:7]
            halves = (choosing, rows) if selector.is_gate else (rows, choosing)
            products = [x @ half.T for half in halves]
            bias = exact.get("gate_up_proj_bias")
            if bias is not None:
                products = [p + b for p, b in zip(products, split_halves(gate, bias), strict=True)]
            joined = type(gate)(
                activation=gate.activation, gated=True, alpha=gate.alpha, limit=gate.limit
            )
            wanted = gate_output(joined, torch.cat(products, dim=1)) @ columns
            wanted += exact.get("down_proj_bias", 0)
            found = expert_forward(layer.module, weights, x)
            # The selector's product rounds tokens to 8 bits.
            assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_thresholds_leave_out_what_they_say_of_every_expert(
    packed: tuple[LocatedModel, Path, Path],
) -> None:
    model, profile, bundle = packed
    opened = open_model(model)
    with opened.checkpoint, BundleReader.open(bundle) as reader, ProfileReader.open(profile) as p:
        for layer in CalibratedModel(model.folder, opened, p.tokens).layers():
            for expert in range(opened.shape.experts):
                selector = selector_of(read_expert(reader, layer.layer, expert))
                assert selector.thresholds[0] == 0 and (np.diff(selector.thresholds) >= 0).all()
                inputs = layer.sample(expert, most_measured=1).fitted_on
                values = selector_values(layer.module, selector, inputs)
                sizes = channel_sizes(layer.module, selector, values)  # [n, I]
                for sparsity in (0.5, 0.8, 0.9):
                    is_kept = sizes >= selector.threshold(sparsity)
                    assert abs(1 - is_kept.float().mean() - sparsity) < 0.02
                    chosen = choose_channels(layer.module, selector, inputs[:1], sparsity)
                    # Alone: torch's products of many tokens may round otherwise.
                    own = selector_values(layer.module, selector, inputs[:1])
                    kept = channel_sizes(layer.module, selector, own)[0]
                    kept = torch.nonzero(kept >= selector.threshold(sparsity)).flatten()
                    assert chosen.index.tolist() == kept.tolist()
                    assert torch.equal(chosen.values, own[:, kept])
                everything = choose_channels(layer.module, selector, inputs[:1], 0)
                assert everything.index.tolist() == list(range(selector.weight.n_outputs))


def test_bytes_are_those_of_the_formula(packed: tuple[LocatedModel, Path, Path]) -> None:
    _, _, bundle = packed
    with BundleReader.open(bundle) as reader:
        shape, precision = reader.manifest.shape, reader.forms[0].table.precision
        assert precision.kind == "channels"
        n_hidden, n_channels = next(t.shape for t in shape.expert_tensors if t.name == "down_proj")
        groups = -(-n_hidden // precision.group)
        chunk = 2 * (n_hidden * precision.width_bits // 8 + 2 * groups)
        page = 4096
        assert reader.forms[0].record_size_bytes <= n_channels * chunk + page
        scales = 2 * groups * -(-n_channels // 16) * 16
        codes = -(-n_channels // 16) * 16 * n_hidden * precision.selector_bits // 8
        vectors = 4 * (2 * n_channels + n_hidden)
        parts = codes + scales + 8 * n_channels + vectors
        assert reader.forms[1].record_size_bytes <= parts + 7 * page
        assert reader.manifest.primary_bytes == reader.expert_bytes + reader.selector_bytes


@pytest.mark.parametrize("after", [1, 8])
def test_an_interrupted_pack_resumes_to_the_same_bytes(
    after: int,
    packed: tuple[LocatedModel, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, profile, bundle = packed
    sparse = ARCHITECTURES[model.name]
    write = BundleWriter.write_record

    def killing(self: BundleWriter, *args: object, **kwargs: object) -> None:
        if self.n_written == after:
            raise KeyboardInterrupt
        write(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(BundleWriter, "write_record", killing)
    with pytest.raises(KeyboardInterrupt):
        pack_bundle(model, out=tmp_path / "b", sparse_experts=sparse, profile=profile)
    monkeypatch.undo()
    report = pack_bundle(model, out=tmp_path / "b", sparse_experts=sparse, profile=profile)
    assert report.resumed_records == after
    for path in sorted(bundle.iterdir()):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparse_experts": "up4"}, "not known"),
        ({"sparse_experts": "down2"}, "not known"),
        ({"bits": "4"}, "has the bits of all parts"),
        ({"replicas": "4"}, "no expert has more bits"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    options: dict[str, str], says: str, packed: tuple[LocatedModel, Path, Path], tmp_path: Path
) -> None:
    model, profile, _ = packed
    with pytest.raises(UsageError, match=says):
        pack_bundle(
            model, out=tmp_path / "b", profile=profile, **{"sparse_experts": "up2", **options}
        )


def test_channels_need_a_profile(packed: tuple[LocatedModel, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no profile"):
        pack_bundle(packed[0], out=tmp_path / "b", sparse_experts="up2")


@pytest.mark.parametrize("quantizer", sorted(set(QUANTIZERS) - {"rtn"}))
def test_every_quantizer_makes_channels_that_are_near(
    quantizer: str, packed: tuple[LocatedModel, Path, Path], tmp_path: Path
) -> None:
    model, profile, bundle = packed
    report = pack_bundle(
        model, out=tmp_path / "b", sparse_experts="gate3", quantizer=quantizer, profile=profile
    )
    assert report.output_error is not None and 0 < report.output_error < 0.35
    with BundleReader.open(tmp_path / "b") as reader:
        reader.verify_all()
        assert selector_of(read_expert(reader, reader.manifest.shape.layers[0], 0)).is_gate


@pytest.mark.parametrize("name", ["up2:4", "gate3:8", "up3:4:128"])
def test_a_precision_is_named_as_it_is_read(name: str) -> None:
    assert channel_precision(name).name == name


# --- hostile files ---


def copy_of(bundle: Path, out: Path, changed: str) -> Path:
    out.mkdir()
    for path in bundle.iterdir():
        if path.name == changed:
            (out / path.name).write_bytes(path.read_bytes())
        else:
            os.link(path, out / path.name)
    return out


def _other_width(manifest: dict) -> None:
    for table in manifest["forms"]:
        table["precision"]["width_bits"] ^= 12  # 8 and 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["forms"].pop(), "go together"),
        (lambda m: m["forms"][0].update(precision={"kind": "native"}), "go together"),
        (lambda m: m["forms"][1]["records"].pop(), "not those of the experts"),
        (lambda m: m["forms"][1]["records"].reverse(), "not those of the experts"),
        (lambda m: m["forms"][1]["records"][0].update(offset=4097), "not aligned"),
        (lambda m: m["forms"][1]["records"][0].update(offset=2**40), "ends beyond"),
        (lambda m: m["forms"][1].update(records=m["forms"][0]["records"]), "records of two forms"),
        (_other_width, "its tensors need"),
        (lambda m: m["forms"][0]["precision"].update(selector_bits=1), "selector_bits"),
        (lambda m: m["forms"][0]["precision"].update(selected_by="down"), "selected_by"),
        (lambda m: m["forms"][1].update(record_size_bytes=4096), "its tensors need"),
        (lambda m: m["shape"]["expert_tensors"][0].update(name="up_proj"), "no joined gate"),
        (lambda m: m["removed"].append([0, 0]), "25 records"),
        (lambda m: m["forms"].reverse(), "not in the order"),
        (lambda m: m["forms"][1].update(role="replica"), "no form for the role"),
    ],
)  # fmt: skip
def test_a_forged_manifest_is_refused(
    change: Callable[[dict], object],
    says: str,
    packed: tuple[LocatedModel, Path, Path],
    tmp_path: Path,
) -> None:
    folder = copy_of(packed[2], tmp_path / "b", "manifest.json")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtifactError, match=says):
        BundleReader.open(folder)


def forge(
    bundle: Path, out: Path, level: int, change: Callable[[BundleReader, bytearray], None]
) -> Path:  # noqa: E501
    """A copy with another first record of a level, whose own hash is right."""
    with BundleReader.open(bundle) as reader:
        entry = reader.forms[level].table.records[0]
        size = reader.forms[level].record_size_bytes
        folder = copy_of(bundle, out, entry.file)
        data = bytearray((folder / entry.file).read_bytes())
        record = data[entry.offset : entry.offset + size]
        change(reader, record)
    data[entry.offset : entry.offset + size] = record
    (folder / entry.file).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["forms"][level]["records"][0]["xxh3"] = xxhash.xxh3_64_hexdigest(bytes(record))
    del manifest["sha256"]
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _set_thresholds(values: list[float]) -> Callable[[BundleReader, bytearray], None]:
    def change(reader: BundleReader, record: bytearray) -> None:
        layout = reader.forms[1].form.layout
        segment = next(s for s in layout.segments if s.name == "thresholds")
        raw = np.array(values, dtype="<f2").tobytes()
        record[segment.offset : segment.offset + len(raw)] = raw

    return change


@pytest.mark.parametrize(
    ("values", "says"),
    [([0.0, 2.0, 1.0], "ascend"), ([1.0, 2.0], "ascend"), ([0.0, float("nan")], "NaN")],
)
def test_thresholds_that_are_none_are_refused(
    values: list[float], says: str, packed: tuple[LocatedModel, Path, Path], tmp_path: Path
) -> None:
    folder = forge(packed[2], tmp_path / "b", 1, _set_thresholds(values))
    with BundleReader.open(folder) as reader, pytest.raises(CorruptArtifactError, match=says):
        reader.verify_all()


def acquire(
    store: ChannelStore, key: tuple[int, int], chosen: list[int] | None
) -> tuple[ChannelExpert, PhaseCounters]:
    counters = PhaseCounters()
    if chosen is not None:
        index = torch.tensor(chosen, dtype=torch.int32)
        found = ChosenChannels(index=index, values=torch.zeros(1, len(chosen)))
        store.select_channels(key[0], [key[1]], lambda selector: found)
    ((_, weights),) = store.acquire(key[0], [key[1]], counters)
    assert isinstance(weights, ChannelExpert)
    return weights, counters


def test_only_missing_channels_are_read_and_a_later_whole_call_gets_the_rest(
    packed: tuple[LocatedModel, Path, Path],
) -> None:
    with BundleReader.open(packed[2]) as reader:
        entry = reader.forms[0].table.records[0]
        key = (entry.layer, entry.expert)
        whole = read_expert(reader, *key).channels.chunks
        chunk = whole.shape[1]
        far = 1 + -(-512 // chunk)  # beyond a gap that is read through
        store = ChannelStore(reader, form=0, n_slots=3, eviction=Lru)
        wanted = [0, 1, 1 + far + 1]
        weights, counters = acquire(store, key, wanted)
        assert (counters.hits, counters.misses) == (0, 1)
        assert counters.bytes_read == 3 * chunk
        assert counters.whole_bytes == reader.forms[0].record_size_bytes
        assert counters.channels_used == 3 and counters.channels == len(whole)
        assert torch.equal(weights.channels.chunks[wanted], whole[wanted])
        _, again = acquire(store, key, wanted)
        assert (again.hits, again.bytes_read) == (1, 0)
        weights, more = acquire(store, key, [0, len(whole) - 1])
        assert (more.hits, more.bytes_read) == (1, chunk)
        weights, rest = acquire(store, key, None)
        assert rest.hits == 1 and torch.equal(weights.channels.chunks, whole)
        assert 0 < rest.bytes_read <= (len(whole) - 4) * chunk + 1024
        assert rest.sparsity == 0
        store.close()


def test_what_lies_in_a_short_gap_comes_along(packed: tuple[LocatedModel, Path, Path]) -> None:
    with BundleReader.open(packed[2]) as reader:
        entry = reader.forms[0].table.records[0]
        key = (entry.layer, entry.expert)
        whole = read_expert(reader, *key).channels.chunks
        store = ChannelStore(reader, form=0, n_slots=3, eviction=Lru)
        _, counters = acquire(store, key, [3, 5])
        assert counters.bytes_read == 3 * whole.shape[1]
        _, again = acquire(store, key, [4])
        assert again.bytes_read == 0
        store.close()


@pytest.mark.parametrize("hash_is_right", [False, True])
def test_a_damaged_channel_is_found_when_it_is_read(
    hash_is_right: bool, packed: tuple[LocatedModel, Path, Path], tmp_path: Path
) -> None:
    """By its own hash, which stands in the selector: that of the record was forged."""

    def change(reader: BundleReader, record: bytearray) -> None:
        form = reader.forms[0].form
        record[20 * form.layout.segments[0].shape[1] + 3] ^= 1

    if hash_is_right:
        folder = forge(packed[2], tmp_path / "b", 0, change)
    else:
        with BundleReader.open(packed[2]) as reader:
            entry = reader.forms[0].table.records[0]
            folder = copy_of(packed[2], tmp_path / "b", entry.file)
            data = bytearray((folder / entry.file).read_bytes())
            part = data[entry.offset :]
            change(reader, part)
            (folder / entry.file).write_bytes(data[: entry.offset] + part)
    with BundleReader.open(folder) as reader:
        entry = reader.forms[0].table.records[0]
        key = (entry.layer, entry.expert)
        store = ChannelStore(reader, form=0, n_slots=3, eviction=Lru)
        acquire(store, key, [0, 1])
        with pytest.raises(CorruptArtifactError, match=f"expert {key[1]} in .*channel 20"):
            acquire(store, key, [0, 20])
        store.close()
    with BundleReader.open(folder) as reader:
        store = ChannelStore(reader, form=0, n_slots=3, eviction=Lru)
        with pytest.raises(CorruptArtifactError, match="channel 20"):
            acquire(store, key, [20])
        store.close()


def test_a_bundle_that_changes_meanwhile_is_refused(
    packed: tuple[LocatedModel, Path, Path], tmp_path: Path
) -> None:
    with BundleReader.open(packed[2]) as reader:
        entry = reader.forms[0].table.records[0]
    folder = copy_of(packed[2], tmp_path / "b", entry.file)
    with BundleReader.open(folder) as reader:
        store = ChannelStore(reader, form=0, n_slots=3, eviction=Lru)
        key = (entry.layer, entry.expert)
        acquire(store, key, [0, 1])
        os.utime(folder / entry.file, ns=(1, 1))
        with pytest.raises(CorruptArtifactError, match="changed after"):
            acquire(store, key, [30])
        store.close()
