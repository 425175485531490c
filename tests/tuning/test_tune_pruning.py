"""Trained pruning of whole bundles: what is learned, what a run makes of it, what is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_tool.artifacts.bundle_sections import MASK_ROUTER
from moe_tool.artifacts.pack_plan import LayerBits
from moe_tool.budget.request import parse_memory
from moe_tool.errors import (
    BudgetError,
    CorruptArtifactError,
    DataSourceError,
    NotFoundError,
    UsageError,
)
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel, locate_model
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import TextSource, parse_sources
from moe_tool.tuning import tune_pruning as story
from moe_tool.tuning.blend_routers import Blend
from moe_tool.tuning.train_mask_router import MaskTraining, TrainingPlan
from moe_tool.tuning.tune_pruning import TunePruningOptions, tune_pruning
from tests.packed import pack_bundle
from tests.planning.made_plan import made_plan

SMALL = TunePruningOptions(
    tokens=1024, seq_len=32, batch=4, threads=1, rate=0.2, memory=parse_memory("100%")
)
STATE = ".pruning-training.safetensors"


@pytest.fixture
def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a training of a moment be kept, though it has learned nothing of use."""
    monkeypatch.setattr(
        story,
        "choose_blend",
        lambda experts, start, trained, *_, **__: Blend(share=1, routers=trained, to_start=1),
    )


@pytest.fixture
def sources(tmp_path: Path) -> tuple[TextSource, ...]:
    (tmp_path / "words.txt").write_text("the list of the items is a list of words. " * 400)
    return tuple(parse_sources([str(tmp_path / "words.txt")]))


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("mixtral", bits="4"), tmp_path / "bundle"))


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, whose experts are trained, with its routers trained for a moment."""
    out = tmp_path_factory.mktemp("demo") / "bundle"
    pack_bundle(locate_model("demo", offline=True, announce=print), out=out, bits="4")
    options = TunePruningOptions(
        tokens=8192, seq_len=64, batch=4, threads=1, memory=parse_memory("100%")
    )
    tune_pruning(out, parse_sources(["builtin"]), options)
    return out


def test_learned_pruning_keeps_to_its_rates_and_beats_random(demo_bundle: Path) -> None:
    rates = (0, 0.2, 0.35)
    names = [f"prune:learned:rate={rate}" for rate in rates]
    report = evaluate(
        demo_bundle,
        parse_sources(["builtin:eval"]),
        EvaluateOptions(
            tokens=768,
            seq_len=64,
            policy=parse_miss_policy(names[1]),
            also=tuple(map(parse_miss_policy, (*names, "exact", "prune:random"))),
            memory=parse_memory("50%"),
            threads=1,
        ),
    )
    rows = {row.policy: row.figures for row in report.rows}
    shape = BundleReader.open(demo_bundle).manifest.shape
    chosen = len(shape.layers) * shape.top_k
    left_out = [rows[name].drops_per_token / chosen for name in names]
    assert left_out[0] == 0 and rows[names[0]].kl_mean.value == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(left_out, rates, atol=0.04)
    kl = [rows[name].kl_mean.value for name in names]
    read = [rows[name].bytes_read_per_token.value for name in names]
    assert kl == sorted(kl) and read == sorted(read, reverse=True)
    assert read[0] == rows["exact"].bytes_read_per_token.value
    random = rows["prune:random"]
    assert random.drops_per_token / chosen == pytest.approx(0.2, abs=0.02)
    assert 0 < rows[names[1]].kl_mean.value < 0.7 * random.kl_mean.value


def test_what_a_drop_leaves_unread_is_counted(demo_bundle: Path) -> None:
    read, spared = [], []
    for policy in ("prune:learned:rate=0", "prune:learned:rate=0.35"):
        options = run_options(policy=policy, memory="50%", context=64, threads=1)
        with open_session(demo_bundle, options) as session:
            ids = torch.tensor([list(range(5, 21))])
            cache = session.model(input_ids=ids, use_cache=True).past_key_values
            session.model(input_ids=torch.tensor([[30]]), past_key_values=cache)
            counters = session.runner.stats.decode
            read.append(counters.bytes_read)
            spared.append(counters.skipped_fetch_bytes)
            record = session.bundle.forms[0].record_size_bytes
    assert spared[0] == 0
    assert spared[1] > 0 and spared[1] % record == 0
    assert read[1] <= read[0]


@pytest.mark.usefixtures("keeps_all")
def test_training_in_small_forwards_is_the_same_training(
    bundle: Path, sources: tuple[TextSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    routers = []
    for n_micro in (4, 1):
        opened = story._open

        def fewer(reader, options, *more, n_micro=n_micro, opened=opened):
            return opened(reader, replace(options, batch=n_micro), *more)

        with monkeypatch.context() as patched:
            patched.setattr(story, "_open", fewer)
            tune_pruning(bundle, sources, SMALL)
        with BundleReader.open(bundle) as reader:
            routers.append(reader.mask_router())
    for layer, together in routers[0].items():
        np.testing.assert_allclose(together.bias, routers[1][layer].bias, atol=1e-3)
        np.testing.assert_allclose(together.by_hidden, routers[1][layer].by_hidden, atol=1e-3)
        assert np.abs(together.by_hidden).max() > 0.02  # it began at 0


@pytest.mark.usefixtures("keeps_all")
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    bundle: Path, sources: tuple[TextSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune_pruning(bundle, sources, SMALL)
    with BundleReader.open(bundle) as reader:
        assert all(np.abs(each.by_hidden).max() > 0.02 for each in reader.mask_router().values())
    advance = MaskTraining.advance

    def interrupted(training, *arguments, **named):
        if training.step == 4:
            raise KeyboardInterrupt
        return advance(training, *arguments, **named)

    monkeypatch.setattr(story, "_SAVE_EVERY_S", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(MaskTraining, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune_pruning(bundle, sources, SMALL)
    assert (bundle / STATE).exists()
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(
            MaskTraining,
            "advance",
            lambda training, *a, **n: steps.append(training.step) or advance(training, *a, **n),
        )
        again = tune_pruning(bundle, sources, SMALL)
    assert steps[0] == 4 and len(steps) == whole.steps - 4
    assert again.file == whole.file  # it is named after its content
    assert not (bundle / STATE).exists()


@pytest.mark.usefixtures("keeps_all")
def test_a_state_of_another_training_is_not_gone_on_with_and_a_damaged_one_is_refused(
    bundle: Path, sources: tuple[TextSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "_SAVE_EVERY_S", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(story, "write_mask_router", _fails)
        with pytest.raises(OSError, match="no disk"):
            tune_pruning(bundle, sources, SMALL)
    state = (bundle / STATE).read_bytes()
    tune_pruning(bundle, sources, replace(SMALL, seed=1))
    (bundle / STATE).write_bytes(state[:-4])
    with pytest.raises(CorruptArtifactError, match="truncated"):
        tune_pruning(bundle, sources, SMALL)
    (bundle / STATE).write_bytes(state[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(CorruptArtifactError, match="NaN"):
        tune_pruning(bundle, sources, SMALL)


def test_a_state_belongs_to_the_weights_it_was_trained_with(bundle: Path) -> None:
    """One record that is another one, or an expert less, is another training."""
    with BundleReader.open(bundle) as reader:
        manifest = reader.manifest
    plan = TrainingPlan(share=0.2, ids=torch.arange(12).view(3, 4), batch=1, seed=0)
    (table,) = manifest.forms
    first = table.records[0].model_copy(update={"xxh3": "0" * 16})
    other = table.model_copy(update={"records": (first, *table.records[1:])})
    changed = [
        manifest,
        manifest.model_copy(update={"forms": (other,)}),
        manifest.model_copy(update={"removed": ((0, 0),)}),
        manifest.model_copy(update={"skeleton": manifest.skeleton[1:]}),
    ]
    orders = [story._order(each, plan, SMALL) for each in changed]
    assert len(set(orders)) == 4
    heat = manifest.model_copy(update={"heat": None, "plan": None, "sections": {}})
    assert story._order(heat, plan, SMALL) == orders[0]


def _fails(*_: object) -> None:
    raise OSError("no disk")


@pytest.mark.usefixtures("keeps_all")
def test_nothing_else_of_the_bundle_changes_and_an_old_router_makes_room(
    bundle: Path, sources: tuple[TextSource, ...]
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    first = tune_pruning(bundle, sources, SMALL)
    second = tune_pruning(bundle, sources, replace(SMALL, seed=1))
    after = {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert first.file != second.file
    assert after.keys() - before.keys() == {second.file}
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    with BundleReader.open(bundle) as reader:
        reader.verify_all()
        assert reader.manifest.pruning is not None
        others = {n: s for n, s in reader.manifest.sections.items() if n != MASK_ROUTER}
        assert reader.manifest.model_copy(
            update={"sections": others, "files": reader.manifest.files[:-1]}
        ).model_dump() == _manifest(before["manifest.json"], bundle)


def _manifest(data: bytes, bundle: Path) -> dict[str, object]:
    old = bundle.parent / "old"
    old.mkdir()
    (old / "manifest.json").write_bytes(data)
    from moe_tool.artifacts.bundle_manifest import BundleManifest
    from moe_tool.formats.json_artifact import read_json_artifact

    return read_json_artifact(old / "manifest.json", BundleManifest).model_dump()


def test_what_cannot_be_is_refused(bundle: Path, sources: tuple[TextSource, ...]) -> None:
    for rate in (0.0, 0.5, -1.0):
        with pytest.raises(UsageError, match="not possible with 2 experts"):
            tune_pruning(bundle, sources, replace(SMALL, rate=rate))
    with pytest.raises(DataSourceError, match="too few"):
        tune_pruning(bundle, sources, replace(SMALL, tokens=32))
    with pytest.raises(BudgetError):
        tune_pruning(bundle, sources, replace(SMALL, memory=parse_memory("1MiB")))
    with pytest.raises(NotFoundError, match="no trained mask routers"):
        open_session(bundle, run_options(policy="prune:learned", memory="50%", context=64))


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_other_architectures_are_trained_too(
    arch: str,
    tiny_bundle: Callable[..., Path],
    sources: tuple[TextSource, ...],
    tmp_path: Path,
) -> None:
    skeleton_bits = "4" if arch == "qwen3_moe" else "native"
    made = tiny_bundle(arch, bits="4", dtype="bfloat16", skeleton_bits=skeleton_bits)
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    report = tune_pruning(bundle, sources, SMALL)
    assert report.left_out == pytest.approx(0.2, abs=0.03) and report.kl.value > 0
    with open_session(
        bundle,
        run_options(policy="prune:learned", memory="50%", context=64, threads=1),
    ) as session:
        ids = torch.tensor([[5, 6, 7, 8]])
        cache = session.model(input_ids=ids, use_cache=True).past_key_values
        session.model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        assert session.runner.stats.prompt.drops == 0


def test_bundles_of_parts_or_without_some_experts_are_refused(
    tiny_checkpoint: Callable[..., Path], sources: tuple[TextSource, ...], tmp_path: Path
) -> None:
    model = LocatedModel(folder=tiny_checkpoint("mixtral", "bfloat16"), name="tiny")
    record_profile(model, parse_sources(["builtin"]), out=tmp_path / "p.h5", tokens=256, seq_len=32)
    pack_bundle(model, out=tmp_path / "c", sparse_experts="gate2", profile=tmp_path / "p.h5")
    with pytest.raises(UsageError, match="in channels"):
        tune_pruning(tmp_path / "c", sources, SMALL)
    shape = BundleReader.open(tmp_path / "c").manifest.shape
    plan = made_plan(
        identity=BundleReader.open(tmp_path / "c").manifest.identity,
        bits="mixed",
        expert_bits=tuple(
            LayerBits(layer=layer, bits=(0, *[4] * (shape.experts - 1))) for layer in shape.layers
        ),
    )
    pack_bundle(model, out=tmp_path / "a", bits="mixed", plan=plan)
    with pytest.raises(UsageError, match="mask routers need all"):
        tune_pruning(tmp_path / "a", sources, SMALL)


def test_the_budget_of_a_plan_is_for_running(
    tiny_checkpoint: Callable[..., Path], sources: tuple[TextSource, ...], tmp_path: Path
) -> None:
    model = LocatedModel(folder=tiny_checkpoint("mixtral", "bfloat16"), name="tiny")
    record_profile(model, parse_sources(["builtin"]), out=tmp_path / "p.h5", tokens=256, seq_len=32)
    with ProfileReader.open(tmp_path / "p.h5") as profile:
        plan = made_plan(identity=profile.header.identity, bits="4", memory_bytes=2**20)
    pack_bundle(model, out=tmp_path / "b", bits="4", plan=plan, profile=tmp_path / "p.h5")
    with pytest.raises(BudgetError):
        open_session(tmp_path / "b", run_options(context=64))
    report = tune_pruning(tmp_path / "b", sources, replace(SMALL, memory=None))
    assert report.memory_budget_bytes > 2**20
