"""Norms and routers trained behind the codes: what is kept, where it lies, resumes, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.errors import BudgetError, CorruptArtifactError, UsageError
from moe_tool.experts import linear
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.inspection.describe_bundle import describe_bundle
from moe_tool.models.locate import LocatedModel, locate_model
from moe_tool.models.moe_layers import find_moe_layers
from moe_tool.models.output_divergence import total_divergence
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.native import kernels
from moe_tool.progress import SILENT
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources
from moe_tool.tuning import tune_floats as story
from moe_tool.tuning.judge_floats import rerouted_share
from moe_tool.tuning.train_floats import FloatPlan, FloatTraining
from moe_tool.tuning.tune_options import TuneOptions
from moe_tool.tuning.tune_weights import TuneReport, tune_weights
from tests.packed import pack_bundle
from tests.tuning.test_tune_weights import Killed, contents

SOURCES = parse_sources(["builtin"])
CODES = TuneOptions(steps=4, batch=64, tokens=1024, seq_len=16)
BOTH = replace(CODES, norms=True, router=True)
WILD = replace(BOTH, float_rate=0.1)
STILL = TuneOptions(
    steps=20,
    batch=512,
    tokens=8192,
    seq_len=64,
    feedback="none",
    rate=1e-9,
    norms=True,
    router=True,
)
"""Codes stay where they are, so that all that changes is what norms and routers learn"""


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint("qwen3_moe"), name="tiny")


@pytest.fixture(scope="module")
def bundle(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    pack_bundle(model, out=out, bits="2")
    return out


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, which is trained, at 2 bits."""
    out = tmp_path_factory.mktemp("rounded") / "b"
    pack_bundle(locate_model("demo"), out=out, bits="2")
    return out


@pytest.fixture(scope="module")
def tuned(rounded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuneReport]:
    out = tmp_path_factory.mktemp("tuned") / "t"
    options = replace(STILL, float_rate=0.002)
    return out, tune_weights(rounded, locate_model("demo"), SOURCES, options, out=out)


def skeleton(folder: Path) -> dict[str, torch.Tensor]:
    with BundleReader.open(folder) as reader, reader.open_skeleton() as held:
        return {tensor.name: held.read(tensor.name) for tensor in reader.manifest.skeleton}


def served(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return what a session predicts, [B, S, V]."""
    options = run_options(memory="100%", context=256, threads=1, policy="exact")
    with open_session(folder, options) as session, torch.no_grad():
        return session.model(input_ids=ids).logits.float()


def test_what_pays_is_kept_and_lowers_the_divergence_of_a_run_on_other_text(
    rounded: Path, tuned: tuple[Path, TuneReport]
) -> None:
    folder, report = tuned
    floats = report.floats
    assert floats is not None and floats.is_kept and floats.change_ci95[1] < 0
    assert floats.best.kl < floats.codes_alone.kl
    demo = locate_model("demo").folder
    ids = build_sequences(
        parse_sources(["builtin:eval"]),
        load_tokenizer(demo),
        vocabulary=2048,
        n_tokens=1024,
        seq_len=128,
        holdout=0.0,
        seed=3,
    ).ids
    text = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)(text).logits
    before, after = (
        total_divergence(exact.flatten(0, 1), served(each, text).flatten(0, 1))
        for each in (rounded, folder)
    )
    assert after < before


def test_only_norms_and_routers_are_other_tensors_and_they_are_floats(
    rounded: Path, tuned: tuple[Path, TuneReport]
) -> None:
    old, new = skeleton(rounded), skeleton(tuned[0])
    assert list(old) == list(new)
    changed = {name for name in old if not torch.equal(old[name].float(), new[name].float())}
    floats = tuned[1].floats
    assert floats is not None and changed == set(floats.tensors)
    assert {new[name].dtype for name in changed} == {torch.float32}
    kinds = {"norm" if "norm" in name else name.split(".")[-2] for name in changed}
    wanted = {"norm": floats.norms, "gate": floats.router}
    assert kinds == {kind for kind, share in wanted.items() if share}
    if floats.norms:
        assert "model.norm.weight" in changed
    with BundleReader.open(tuned[0]) as reader:
        reader.verify_all()
        options = run_options(memory="100%", context=64, threads=1)
        with open_session(tuned[0], options) as session:
            held = dict(session.model.named_parameters())["model.norm.weight"]
            assert torch.equal(held, new["model.norm.weight"].float())
    assert not list(tuned[0].glob(".*"))


def test_a_run_is_transformers_with_the_same_tensors(
    tuned: tuple[Path, TuneReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the rounding of tokens to int8, which integer weights imply and is off here."""
    monkeypatch.setattr(kernels, "kernels_in_use", lambda: "torch")
    monkeypatch.setattr(linear, "round_trip_tokens", lambda tokens, group: tokens)
    model = AutoModelForCausalLM.from_pretrained(locate_model("demo").folder, dtype=torch.float32)
    new, floats = skeleton(tuned[0]), tuned[1].floats
    assert floats is not None
    parameters = dict(model.named_parameters())
    for name in floats.tensors:
        parameters[name.replace("block_sparse_moe", "mlp")].data = new[name]
    with BundleReader.open(tuned[0]) as reader:
        for moe in find_moe_layers(model):
            for expert in range(reader.manifest.shape.experts):
                held = reader.primary_form(moe.layer, expert)
                record = torch.empty(held.record_size_bytes, dtype=torch.uint8)
                reader.read_record_into(moe.layer, expert, record, form=held.index)
                for name, weight in held.form.decode(record).items():
                    getattr(moe.experts, name).data[expert] = dequantize(weight)
    ids = torch.arange(5, 69)[None]
    with torch.no_grad():
        assert torch.allclose(served(tuned[0], ids), model(ids).logits, atol=1e-3)


def test_inspect_says_what_was_kept_and_what_it_is_worth(tuned: tuple[Path, TuneReport]) -> None:
    found = describe_bundle(tuned[0], verify=True, progress=SILENT)
    floats = tuned[1].floats
    assert floats is not None
    assert f"{floats.norms:.0%} of the training of norms kept" in str(found.facts["tuned_floats"])
    assert f"KL {floats.best.kl:.4f}" in str(found.facts["tuned_floats_measured"])
    assert f"KL {floats.codes_alone.kl:.4f}" in str(found.facts["tuned_floats_without"])
    assert "tuned-floats" in found.details["sections"]


def test_at_rate_0_the_bundle_is_that_of_the_codes_alone(
    bundle: Path, model: LocatedModel, tmp_path: Path
) -> None:
    tune_weights(bundle, model, SOURCES, CODES, out=tmp_path / "codes")
    still = replace(BOTH, float_rate=0.0)
    report = tune_weights(bundle, model, SOURCES, still, out=tmp_path / "both")
    codes, both = contents(tmp_path / "codes"), contents(tmp_path / "both")
    manifests = [json.loads(each.pop(MANIFEST)) for each in (codes, both)]
    assert codes == both
    for each in manifests:
        del each["sha256"]
    assert "tuned-floats" not in manifests[0]["sections"]
    assert not {"tune.norms", "tune.router", "tune.float_rate"} & manifests[0]["made_from"].keys()
    section = manifests[1].pop("sections")["tuned-floats"]["body"]
    assert report.floats is not None and not report.floats.is_kept
    assert (section["norms"], section["router"], section["tensors"]) == (0, 0, [])
    assert {share for _, share in section["rerouted"]} == {0}
    assert section["best"] == section["codes_alone"] and section["change_ci95"] == [0, 0]
    for name in ("tune.norms", "tune.router", "tune.float_rate"):
        del manifests[1]["made_from"][name]
    del manifests[0]["sections"]
    assert manifests[0] == manifests[1]


def test_sequences_come_in_turn_and_the_rate_falls_to_a_tenth() -> None:
    ids = torch.zeros(5, 2, dtype=torch.int64)
    plan = FloatPlan(ids=ids, n_steps=5, at_once=3, rate=1.0, seed=0)
    drawn = torch.cat([plan.chosen(step) for step in range(5)])
    for turn in drawn.split(5):
        assert sorted(turn.tolist()) == [0, 1, 2, 3, 4]
    assert plan.rate_at(0) == 1.0 and plan.rate_at(5) == pytest.approx(0.1)


def test_rerouted_slots_are_counted_whatever_their_order() -> None:
    before = torch.tensor([[0, 1], [2, 3], [4, 5]])
    after = torch.tensor([[1, 0], [2, 6], [7, 8]])
    assert rerouted_share(before, after) == pytest.approx(3 / 6)


@pytest.fixture(scope="module")
def whole(bundle: Path, model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "t"
    tune_weights(bundle, model, SOURCES, WILD, out=out)
    return out


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_training_becomes_the_uninterrupted_one(
    after: int,
    bundle: Path,
    model: LocatedModel,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two steps, or behind the last one, while it is judged."""
    monkeypatch.setattr(story, "_SAVE_EVERY_S", -1.0)
    advance = FloatTraining.advance

    def killing(self: FloatTraining, *arguments: object) -> float:
        if self.step == after:
            raise Killed
        return advance(self, *arguments)  # type: ignore[arg-type]

    def killed(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(FloatTraining, "advance", killing)
    monkeypatch.setattr(story, "judge_floats", killed)
    with pytest.raises(Killed):
        tune_weights(bundle, model, SOURCES, WILD, out=tmp_path / "t")
    monkeypatch.undo()
    assert not (tmp_path / "t").exists()
    with pytest.raises(UsageError, match=r"tune\.float_rate"):
        tune_weights(bundle, model, SOURCES, BOTH, out=tmp_path / "t")
    report = tune_weights(bundle, model, SOURCES, WILD, out=tmp_path / "t")
    assert report.layers == ()
    assert contents(tmp_path / "t") == contents(whole)


def test_a_damaged_state_of_the_training_is_refused(
    bundle: Path, model: LocatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(story, "judge_floats", killed)
    with pytest.raises(Killed):
        tune_weights(bundle, model, SOURCES, BOTH, out=tmp_path / "t")
    monkeypatch.undo()
    (path,) = (tmp_path / "t.part").glob(".floats-training*")
    data = path.read_bytes()
    for broken, says in (
        (data[:-4], "truncated"),
        (data[:-4] + np.float32(np.nan).tobytes(), "NaN"),
        (data.replace(b"second.model.norm", b"secund.model.norm"), "lacks|holds"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CorruptArtifactError, match=says):
            tune_weights(bundle, model, SOURCES, BOTH, out=tmp_path / "t")
    path.write_bytes(data)
    tune_weights(bundle, model, SOURCES, BOTH, out=tmp_path / "t")


def test_broken_tensors_and_sections_are_refused(
    tuned: tuple[Path, TuneReport], tmp_path: Path
) -> None:
    good = contents(tuned[0])
    floats = tuned[1].floats
    assert floats is not None
    name = floats.tensors[0]

    def forge(change: Callable[[dict[str, bytes], dict[str, object]], None]) -> Path:
        files = dict(good)
        raw = json.loads(files[MANIFEST])
        del raw["sha256"]  # or whatever is changed would be noticed by it
        change(files, raw)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for each, data in (files | {MANIFEST: json.dumps(raw).encode()}).items():
            (folder / each).write_bytes(data)
        return folder

    def section(raw: dict[str, object], **changed: object) -> None:
        raw["sections"]["tuned-floats"]["body"] |= changed  # type: ignore[index]

    for changed in (
        {"tensors": ["model.nothing"]},
        {"tensors": []},
        {"tensors": [name, name]},
        {"norms": 1.5},
        {"norms": None, "router": None},
        {"rerouted": [[-1, 0.5]]},
    ):
        with pytest.raises(CorruptArtifactError):
            BundleReader.open(forge(lambda _, raw, changed=changed: section(raw, **changed)))
    other = forge(lambda _, raw: section(raw, tensors=[name, "model.embed_tokens.weight"]))
    with pytest.raises(CorruptArtifactError, match="F32"):
        BundleReader.open(other)

    def spoil(files: dict[str, bytes], raw: dict[str, object], *, is_forged: bool) -> None:
        value = skeleton(tuned[0])[name].numpy().copy()
        data = value.tobytes()
        value[:1] = np.nan
        (file,) = (each for each in files if data in files[each])
        files[file] = files[file].replace(data, value.tobytes())
        for entry in raw["skeleton"]:  # type: ignore[attr-defined]
            if entry["name"] == name and is_forged:
                entry["xxh3"] = xxhash.xxh3_64_hexdigest(value.tobytes())

    for is_forged, says in ((False, "hash"), (True, "NaN")):
        folder = forge(lambda files, raw, f=is_forged: spoil(files, raw, is_forged=f))
        with pytest.raises(CorruptArtifactError, match=says):
            served(folder, torch.arange(5, 21)[None])


def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    bundle: Path, model: LocatedModel, tuned: tuple[Path, TuneReport], tmp_path: Path
) -> None:
    coded = tmp_path / "coded"
    pack_bundle(model, out=coded, bits="2", skeleton_bits="8")
    demo = locate_model("demo")
    cases: list[tuple[Path, LocatedModel, TuneOptions, type[Exception], str]] = [
        (bundle, model, replace(CODES, float_rate=0.1), UsageError, "--float-rate"),
        (bundle, model, replace(BOTH, float_rate=2.0), UsageError, "--float-rate 2"),
        (bundle, model, replace(BOTH, tokens=64), UsageError, "held-out"),
        (bundle, model, replace(BOTH, memory_bytes=2**20), BudgetError, "has 1.00 MiB"),
        (tuned[0], demo, CODES, UsageError, "were tuned"),
    ]
    for folder, located, options, error, says in cases:
        with pytest.raises(error, match=says):
            tune_weights(folder, located, SOURCES, options, out=tmp_path / "t")
    assert not list(tmp_path.glob("t*"))
    manifest = read_json_artifact(coded / MANIFEST, BundleManifest)
    if "model.layers.0.mlp.gate.weight" not in {each.name for each in manifest.skeleton}:
        with pytest.raises(UsageError, match="as codes"):
            tune_weights(coded, model, SOURCES, BOTH, out=tmp_path / "t")


def test_a_budget_that_does_is_kept(bundle: Path, model: LocatedModel, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as refused:
        tune_weights(bundle, model, SOURCES, replace(BOTH, memory_bytes=2**20), out=tmp_path / "t")
    assert refused.value.hint is not None
    enough = int(float(refused.value.hint.split("--memory ")[1].split("MiB")[0]) * 2**20)
    options = replace(BOTH, memory_bytes=enough)
    report = tune_weights(bundle, model, SOURCES, options, out=tmp_path / "t")
    assert report.memory_needed_bytes <= enough


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_other_architectures(
    arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = LocatedModel(folder=tiny_checkpoint(arch), name="tiny")
    pack_bundle(model, out=tmp_path / "b", bits="2")
    report = tune_weights(tmp_path / "b", model, SOURCES, BOTH, out=tmp_path / "t")
    assert report.floats is not None
    assert torch.isfinite(served(tmp_path / "t", torch.arange(5, 21)[None])).all()
