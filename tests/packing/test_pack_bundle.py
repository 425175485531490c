"""A bundle holds what the checkpoint held, in the order that the profile says, and resumes where it
stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tool.buddies.build_buddy_map import build_buddy_map
from moe_tool.errors import DiskFullError, UnsupportedModelError, UsageError, WrongModelError
from moe_tool.formats.bundle_checks import skeleton_files
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.pack_inputs import order_experts
from moe_tool.profiling.recorder import record_profile
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.tiny_models import make_tiny_checkpoint


def located(folder: Path) -> LocatedModel:
    return LocatedModel(folder=folder, name="tiny")


def profile_of(folder: Path, out: Path) -> Path:
    record_profile(located(folder), parse_sources(["builtin"]), out=out, tokens=256, seq_len=32)
    return out


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_bundle_keeps_every_bit(
    arch: str, dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(arch, dtype)
    pack_bundle(located(folder), out=tmp_path / "b")
    opened = open_model(located(folder))
    with opened.checkpoint, BundleReader.open(tmp_path / "b") as bundle:
        (held,) = bundle.forms
        record = torch.empty(held.record_size_bytes, dtype=torch.uint8)
        for entry in held.table.records:
            bundle.read_record_into(entry.layer, entry.expert, record, form=0)
            found = held.form.decode(record)
            for name, wanted in opened.experts.read(entry.layer, entry.expert).items():
                weight = found[name]
                assert isinstance(weight, FloatWeight)
                assert weight.values.dtype == wanted.dtype
                assert torch.equal(weight.values, wanted)
        skeleton = Checkpoint.open_files(skeleton_files(bundle.folder, bundle.manifest))
        for name in opened.skeleton.tensor_names:
            assert skeleton.read_bytes(name) == opened.checkpoint.read_bytes(name)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_quantized_bundle_holds_round_to_nearest_codes(
    bits: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("gpt_oss", "bfloat16")
    report = pack_bundle(located(folder), out=tmp_path / "b", bits=bits)
    opened = open_model(located(folder))
    with opened.checkpoint, BundleReader.open(tmp_path / "b") as bundle:
        record = torch.empty(bundle.forms[0].record_size_bytes, dtype=torch.uint8)
        bundle.read_record_into(1, 3, record, form=0)
        found = bundle.forms[0].form.decode(record)
        for name, tensor in opened.experts.read(1, 3).items():
            weight = found[name]
            if tensor.ndim == 1:
                assert isinstance(weight, FloatWeight) and torch.equal(weight.values, tensor)
            else:
                assert isinstance(weight, IntegerWeight)
                assert torch.equal(dequantize(weight), dequantize(quantize(tensor, int(bits))))
    assert report.bits_per_weight > int(bits)
    assert report.expert_bytes < report.bytes


def test_records_and_heat_follow_the_profile(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    profile = profile_of(folder, tmp_path / "p.h5")
    with ProfileReader.open(profile) as reader:
        buddies = build_buddy_map(reader, k=2)
        wanted = {
            layer: order_experts(
                reader.statistics(layer).in_sample.load,
                reader.statistics(layer).in_sample.coactivation,
            )
            for layer in reader.layers
        }
    write_json_artifact(tmp_path / "p.buddies.json", buddies)
    pack_bundle(
        located(folder), out=tmp_path / "b", profile=profile, buddies=tmp_path / "p.buddies.json"
    )
    with BundleReader.open(tmp_path / "b") as bundle:
        manifest = bundle.manifest
    assert manifest.heat is not None and manifest.buddies is not None
    assert manifest.buddies.layers == buddies.layers
    for heat in manifest.heat:
        order = [record.expert for record in manifest.primary_records if record.layer == heat.layer]
        assert order == wanted[heat.layer]
        assert sum(heat.load) == pytest.approx(manifest.shape.top_k)


def test_profile_of_another_model_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_tiny_checkpoint("mixtral", tmp_path / "other", seed=1)
    profile = profile_of(other, tmp_path / "p.h5")
    with pytest.raises(WrongModelError, match="was made from"):
        pack_bundle(located(tiny_checkpoint("mixtral")), out=tmp_path / "b", profile=profile)
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.part").exists()


class Killed(BaseException):
    """Nothing on the way may catch it."""


@pytest.mark.parametrize("after", [0, 1, 9, 23])
def test_interrupted_pack_resumes_to_the_same_bytes(
    after: int,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_checkpoint("mixtral")
    pack_bundle(located(folder), out=tmp_path / "whole", bits="4")
    write = BundleWriter.write_record

    def killing(self: BundleWriter, *args: Any, **more: Any) -> None:
        if self.n_written == after:
            raise Killed
        write(self, *args, **more)

    monkeypatch.setattr(BundleWriter, "write_record", killing)
    with pytest.raises(Killed):
        pack_bundle(located(folder), out=tmp_path / "killed", bits="4")
    assert not (tmp_path / "killed").exists()
    monkeypatch.undo()
    with pytest.raises(UsageError, match="packed with bits '4', now '8' is asked for"):
        pack_bundle(located(folder), out=tmp_path / "killed", bits="8")
    report = pack_bundle(located(folder), out=tmp_path / "killed", bits="4")
    assert report.resumed_records == after
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


def test_packing_again_finds_the_bundle_finished(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    first = pack_bundle(located(folder), out=tmp_path / "b")
    again = pack_bundle(located(folder), out=tmp_path / "b")
    assert again.bytes == first.bytes and again.resumed_records == 24
    with pytest.raises(UsageError, match="bits 'native', now '4' is asked for"):
        pack_bundle(located(folder), out=tmp_path / "b", bits="4")


def test_a_pack_refused_for_lack_of_disk_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, needed_bytes: int) -> None:
        raise DiskFullError(f"{folder} needs {needed_bytes} bytes", hint="free some space")

    model = located(make_tiny_checkpoint("mixtral", tmp_path / "model"))
    with monkeypatch.context() as full:
        full.setattr("moe_tool.packing.write_bundle.require_free_disk", refuse)
        with pytest.raises(DiskFullError):
            pack_bundle(model, out=tmp_path / "b")
    assert not (tmp_path / "b.part").exists()
    pack_bundle(model, out=tmp_path / "b", bits="4")


def test_a_bundle_in_place_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    model = located(make_tiny_checkpoint("mixtral", tmp_path / "model"))
    pack_bundle(model, out=tmp_path / "b")
    with pytest.raises(UnsupportedModelError, match="is a bundle") as found:
        pack_bundle(located(tmp_path / "b"), out=tmp_path / "c")
    assert f"moe-tool run {tmp_path / 'b'}" in (found.value.hint or "")
