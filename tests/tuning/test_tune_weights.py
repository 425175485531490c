"""A bundle tuned: better at what it lost, resumable, refused where it cannot be."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.pack_plan import LayerBits
from moe_tool.errors import (
    BudgetError,
    CorruptArtifactError,
    MoeToolError,
    UnsupportedModelError,
    UsageError,
    WrongModelError,
)
from moe_tool.experts.combine import run_experts
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.models.architecture import open_model
from moe_tool.models.layer_stream import LayerStream
from moe_tool.models.locate import LocatedModel
from moe_tool.models.output_divergence import total_divergence
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.profiling.recorder import record_profile
from moe_tool.quantization.weights import FloatWeight
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources
from moe_tool.tuning.paired_layers import PairedModel
from moe_tool.tuning.tune_options import TuneOptions
from moe_tool.tuning.tune_weights import TuneReport, tune_weights
from tests.packed import pack_bundle
from tests.planning.made_plan import made_plan
from tests.tiny_models import TINY, make_tiny_checkpoint

SOURCES = parse_sources(["builtin"])
QUICK = TuneOptions(steps=12, batch=128, tokens=1024, seq_len=32)
LONGER = replace(QUICK, steps=60, tokens=4096, batch=256)


class Killed(BaseException):
    """What a test interrupts with."""


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny")


@pytest.fixture(scope="module")
def bundle(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    pack_bundle(model, out=out, bits="2")
    return out


@pytest.fixture(scope="module")
def tuned(
    bundle: Path, model: LocatedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TuneReport, dict[str, bytes]]:
    before = contents(bundle)
    out = tmp_path_factory.mktemp("tuned") / "t"
    return out, tune_weights(bundle, model, SOURCES, LONGER, out=out), before


@pytest.fixture(scope="module")
def whole(bundle: Path, model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "t"
    tune_weights(bundle, model, SOURCES, QUICK, out=out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def divergence(bundle: Path, model: LocatedModel) -> float:
    """KL(exact || bundle) on text that no tuning has seen, by a forward of its own."""
    opened = open_model(model)
    with opened.checkpoint, BundleReader.open(bundle) as reader:
        ids = build_sequences(
            parse_sources(["builtin:eval"]),
            load_tokenizer(model.folder),
            vocabulary=opened.shape.vocabulary,
            n_tokens=512,
            seq_len=64,
            holdout=0.0,
            seed=3,
        ).ids
        stream = LayerStream(model.folder, opened.checkpoint)
        logits = []
        for is_exact in (True, False):

            def supply(layer: int, wanted: list[int], is_exact: bool = is_exact):
                for expert in wanted:
                    if is_exact:
                        found = opened.experts.read(layer, expert)
                        yield expert, {n: FloatWeight(values=v) for n, v in found.items()}
                        continue
                    held = reader.primary_form(layer, expert)
                    record = torch.empty(held.record_size_bytes, dtype=torch.uint8)
                    reader.read_record_into(layer, expert, record, form=held.index)
                    yield expert, held.form.decode(record)

            stream.set_experts_function(
                lambda c, supply=supply: run_experts(
                    c.module, c.hidden, c.index, c.weight, lambda wanted: supply(c.layer, wanted)
                )
            )
            hidden = stream.initial_hidden(torch.from_numpy(ids.astype(np.int64)))
            for layer in stream.layers():
                hidden = layer.forward(hidden)
            logits.append(stream.logits(hidden).flatten(0, 1))
        return total_divergence(*logits) / ids.size


def test_tuning_wins_back_divergence_on_text_that_it_has_not_seen(
    bundle: Path, model: LocatedModel, tuned: tuple[Path, TuneReport, dict[str, bytes]]
) -> None:
    out, report, _ = tuned
    assert all(layer.error_after < layer.error_before for layer in report.layers)
    assert all(0 < layer.moved < 0.5 for layer in report.layers)
    # Of random weights at 2 bits little is left, and less to be won in 60 steps than of a model.
    assert divergence(out, model) < 0.9 * divergence(bundle, model)


def test_the_bundle_is_whole_and_the_one_before_is_untouched(
    bundle: Path, tuned: tuple[Path, TuneReport, dict[str, bytes]]
) -> None:
    out, _, before = tuned
    assert contents(bundle) == before
    after = contents(out)
    assert before.keys() == after.keys()
    differ = {name for name in before if before[name] != after[name]}
    assert differ == {MANIFEST, "experts-00001.safetensors"}
    with BundleReader.open(out) as reader:
        reader.verify_all()
        assert not (out.parent / f"{out.name}.part").exists()


def test_scales_stay_and_only_codes_move(
    bundle: Path, tuned: tuple[Path, TuneReport, dict[str, bytes]]
) -> None:
    with BundleReader.open(bundle) as old, BundleReader.open(tuned[0]) as new:
        moved = 0
        for expert in range(8):
            records = []
            for reader in (old, new):
                record = torch.empty(reader.forms[0].record_size_bytes, dtype=torch.uint8)
                reader.read_record_into(1, expert, record, form=0)
                records.append(reader.forms[0].form.decode(record))
            for name, weight in records[0].items():
                other = records[1][name]
                assert torch.equal(weight.scales, other.scales)  # type: ignore[union-attr]
                moved += not torch.equal(weight.planes[0], other.planes[0])  # type: ignore[union-attr]
        assert moved > 0


def test_the_manifest_says_where_the_codes_come_from(
    bundle: Path, model: LocatedModel, tuned: tuple[Path, TuneReport, dict[str, bytes]]
) -> None:
    out, report, before = tuned
    manifest = read_json_artifact(out / MANIFEST, BundleManifest)
    (step,) = manifest.lineage
    assert report.lineage == manifest.lineage
    assert step.parent_sha256 == hashlib.sha256(before[MANIFEST]).hexdigest()
    assert (step.steps, step.batch_tokens, step.tokens) == (60, 256, 4096)
    assert (step.optimizer, step.rounding, step.rate, step.seed) == ("sgd", "nearest", 0.1, 0)
    assert step.sources == ("docs=builtin:docs", "code=builtin:code")
    assert all(r.eps is not None and 0 < r.eps < 1 for r in manifest.primary_records)


def test_a_tuned_bundle_may_be_tuned_again(
    model: LocatedModel, tuned: tuple[Path, TuneReport, dict[str, bytes]], tmp_path: Path
) -> None:
    out, _, _ = tuned
    again = tune_weights(out, model, SOURCES, QUICK, out=tmp_path / "again")
    assert [step.steps for step in again.lineage] == [60, 12]
    assert (
        again.lineage[1].parent_sha256 == hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest()
    )


def test_the_optimizer_holds_no_copy_of_the_weights(
    bundle: Path, model: LocatedModel, tmp_path: Path
) -> None:
    n_weights = 8 * (96 * 64 + 64 * 48)  # of one layer
    for optimizer, size in (("sgd", 4), ("adam", 8)):
        options = replace(QUICK, steps=1, optimizer=optimizer)  # type: ignore[arg-type]
        report = tune_weights(bundle, model, SOURCES, options, out=tmp_path / optimizer)
        assert report.state_bytes == size * n_weights
        assert report.state_bytes_per_weight == size


@pytest.mark.parametrize("after", [0, 3, 8, 21])
def test_an_interrupted_run_becomes_the_uninterrupted_one(
    after: int,
    bundle: Path,
    model: LocatedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Path,
) -> None:
    """Within a layer, at its end, and before the first."""
    write = BundleWriter.write_record

    def killing(self: BundleWriter, *arguments: object, **options: object) -> None:
        if self.n_written == after:
            raise Killed
        write(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(BundleWriter, "write_record", killing)
    with pytest.raises(Killed):
        tune_weights(bundle, model, SOURCES, QUICK, out=tmp_path / "t")
    monkeypatch.undo()
    assert not (tmp_path / "t").exists()
    with pytest.raises(UsageError, match=r"tune\.steps"):
        tune_weights(bundle, model, SOURCES, replace(QUICK, steps=13), out=tmp_path / "t")
    report = tune_weights(bundle, model, SOURCES, QUICK, out=tmp_path / "t")
    assert report.resumed_records == after
    assert len(report.layers) == 3 - after // 8
    assert contents(tmp_path / "t") == contents(whole)
    assert tune_weights(bundle, model, SOURCES, QUICK, out=whole).layers == ()


def test_where_tuning_does_not_help_a_layer_stays_as_it_was(
    bundle: Path, model: LocatedModel, tmp_path: Path
) -> None:
    wild = replace(QUICK, rate=50.0)
    report = tune_weights(bundle, model, SOURCES, wild, out=tmp_path / "t")
    assert not any(layer.is_kept for layer in report.layers)
    assert all(layer.error_after == layer.error_before for layer in report.layers)
    name = "experts-00001.safetensors"
    assert (tmp_path / "t" / name).read_bytes() == (bundle / name).read_bytes()


def test_experts_of_floats_removed_ones_and_several_widths(
    model: LocatedModel, tmp_path: Path
) -> None:
    opened = open_model(model)
    opened.checkpoint.close()
    widths = (0, 16, 2, 2, 1, 3, 4, 8)
    bits = tuple(LayerBits(layer=layer, bits=widths) for layer in opened.shape.layers)
    plan = made_plan(identity=opened.identity, bits="mixed", expert_bits=bits)
    pack_bundle(model, out=tmp_path / "b", bits="mixed", plan=plan)
    report = tune_weights(tmp_path / "b", model, SOURCES, LONGER, out=tmp_path / "t")
    assert all(layer.is_kept for layer in report.layers)
    old, new = contents(tmp_path / "b"), contents(tmp_path / "t")
    assert old.keys() == new.keys()
    assert new["experts-native-00001.safetensors"] == old["experts-native-00001.safetensors"]
    assert new["experts-2-00001.safetensors"] != old["experts-2-00001.safetensors"]
    with BundleReader.open(tmp_path / "t") as reader:
        reader.verify_all()
        manifest = reader.manifest
    assert manifest.removed == tuple((layer, 0) for layer in opened.shape.layers)
    assert manifest.plan == plan
    eps = {(r.layer, r.expert): r.eps for r in manifest.primary_records}
    for layer in opened.shape.layers:
        assert eps[layer, 1] == 0.0 and 0 < eps[layer, 7] < eps[layer, 2]  # type: ignore[operator]


def test_replicas_are_taken_along_with_their_prices(model: LocatedModel, tmp_path: Path) -> None:
    profile = tmp_path / "p.h5"
    record_profile(model, SOURCES, out=profile, tokens=512, seq_len=32)
    pack_bundle(model, out=tmp_path / "b", bits="4", replicas="2", profile=profile)
    tune_weights(tmp_path / "b", model, SOURCES, QUICK, out=tmp_path / "t")
    old, new = (
        read_json_artifact(tmp_path / name / MANIFEST, BundleManifest) for name in ("b", "t")
    )
    assert new.cheaper == old.cheaper and new.heat == old.heat and new.prices == old.prices


def test_an_expert_that_no_text_reaches_is_left_and_named(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint("deepseek_v3", tmp_path / "m", seed=1)
    model = LocatedModel(folder=folder, name="tiny")
    pack_bundle(model, out=tmp_path / "b", bits="2")
    few = replace(QUICK, tokens=128, steps=2, batch=16)
    report = tune_weights(tmp_path / "b", model, SOURCES, few, out=tmp_path / "t")
    assert 0 < len(report.untuned) <= 16
    with BundleReader.open(tmp_path / "b") as old, BundleReader.open(tmp_path / "t") as new:
        for layer, expert in report.untuned:
            entries = [reader.record_entry(layer, expert, form=0).xxh3 for reader in (old, new)]
            assert entries[0] == entries[1]


@pytest.mark.parametrize("arch", sorted(TINY))
def test_what_is_wanted_of_a_layer_is_what_its_exact_experts_answer(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """While nothing is lost before it; whatever the architecture multiplies that by."""
    folder = tiny_checkpoint(arch)
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with opened.checkpoint:
        paired = PairedModel(folder, opened, ids, torch.tensor([False, True]))
        layer = next(paired.layers(last=99))
        exact = {
            e: {n: FloatWeight(values=v) for n, v in opened.experts.read(layer.layer, e).items()}
            for e in range(opened.shape.experts)
        }
        text = layer.text
        wanted = run_experts(
            layer.module, text.inputs, text.index, text.weight, lambda w: ((e, exact[e]) for e in w)
        )
    assert torch.allclose(text.target, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_layers_that_do_more_than_scale_what_experts_answer_are_refused(
    model: LocatedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(model)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with opened.checkpoint:
        paired = PairedModel(model.folder, opened, ids, torch.tensor([False, True]))
        answer = paired._answer
        paired._stream.set_experts_function(lambda call: answer(call).square())
        with pytest.raises(UnsupportedModelError, match="scale"):
            next(paired.layers(last=99))


def test_what_cannot_be_tuned_is_refused_before_anything_is_written(
    bundle: Path, model: LocatedModel, tmp_path: Path
) -> None:
    native = tmp_path / "native"
    pack_bundle(model, out=native)
    other = LocatedModel(folder=make_tiny_checkpoint("mixtral", tmp_path / "o", seed=9), name="o")
    cases: list[tuple[Path, LocatedModel, TuneOptions, type[MoeToolError], str]] = [
        (native, model, QUICK, UsageError, "no codes"),
        (bundle, other, QUICK, WrongModelError, "was made from tiny"),
        (bundle, model, replace(QUICK, tokens=32), UsageError, "at least two sequences"),
        (bundle, model, replace(QUICK, rate=-1.0), UsageError, "--rate"),
        (bundle, model, replace(QUICK, memory_bytes=2**20), BudgetError, "has 1.00 MiB"),
    ]
    for folder, located, options, error, says in cases:
        with pytest.raises(error, match=says):
            tune_weights(folder, located, SOURCES, options, out=tmp_path / "t")
    with pytest.raises(UsageError, match="to be tuned"):
        tune_weights(bundle, model, SOURCES, QUICK, out=bundle)
    assert not list(tmp_path.glob("t*"))


def test_a_budget_that_does_is_kept(bundle: Path, model: LocatedModel, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as refused:
        tune_weights(bundle, model, SOURCES, replace(QUICK, memory_bytes=2**20), out=tmp_path / "t")
    assert refused.value.hint is not None
    enough = int(float(refused.value.hint.split("--memory ")[1].split("MiB")[0]) * 2**20)
    options = replace(QUICK, memory_bytes=enough)
    report = tune_weights(bundle, model, SOURCES, options, out=tmp_path / "t")
    assert report.memory_needed_bytes <= enough


def test_without_feedback_codes_stay_where_they_are(
    bundle: Path,
    model: LocatedModel,
    tuned: tuple[Path, TuneReport, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    options = replace(LONGER, feedback="none", rate=0.03)
    plain = tune_weights(bundle, model, SOURCES, options, out=tmp_path / "t")
    moved = [sum(layer.moved for layer in each.layers) for each in (plain, tuned[1])]
    assert moved[0] < 0.1 * moved[1]
    assert plain.lineage[-1].feedback == "none"


def test_nested_experts_and_those_in_channels_are_not_tuned(
    model: LocatedModel, tmp_path: Path
) -> None:
    profile = tmp_path / "p.h5"
    record_profile(model, SOURCES, out=profile, tokens=256, seq_len=32)
    pack_bundle(model, out=tmp_path / "b", bits="2+2", profile=profile)
    with pytest.raises(UsageError, match="nested"):
        tune_weights(tmp_path / "b", model, SOURCES, QUICK, out=tmp_path / "t")
    pack_bundle(model, out=tmp_path / "c", sparse_experts="gate2", profile=profile)
    with pytest.raises(UsageError, match="channels"):
        tune_weights(tmp_path / "c", model, SOURCES, QUICK, out=tmp_path / "t")


@pytest.mark.parametrize("what", ["scales", "shape"])
def test_a_damaged_bundle_is_refused(
    what: str, bundle: Path, model: LocatedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    for name, data in contents(bundle).items():
        (folder / name).write_bytes(data)
    if what == "scales":
        path = folder / "experts-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-5000] ^= 255
        data[-4096 * 2 :] = bytes(255 - byte for byte in data[-4096 * 2 :])
        path.write_bytes(bytes(data))
        with pytest.raises(CorruptArtifactError, match="layer 2 expert 7"):
            tune_weights(folder, model, SOURCES, QUICK, out=tmp_path / "t")
    else:
        manifest = read_json_artifact(folder / MANIFEST, BundleManifest)
        shape = manifest.shape.model_copy(update={"vocabulary": 300})
        write_json_artifact(folder / MANIFEST, manifest.model_copy(update={"shape": shape}))
        with pytest.raises(CorruptArtifactError, match="another shape"):
            tune_weights(folder, model, SOURCES, QUICK, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()
