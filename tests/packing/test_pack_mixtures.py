"""Mixtures of forms in one bundle: widths per expert, nested ones among them, removed experts, and
replicas beside all of it. And what a plan of a pack refuses before anything is read or written."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tool.artifacts.pack_plan import LayerBits, PackPlan
from moe_tool.artifacts.precision import precision_from_bits
from moe_tool.errors import MoeToolError, UsageError, WrongModelError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.expert_coding import coded
from moe_tool.packing.pack_inputs import PackInputs, read_pack_inputs
from moe_tool.packing.pack_options import parse_pack_options
from moe_tool.packing.plan_pack import PackJob, plan_pack
from moe_tool.profiling.recorder import record_profile
from moe_tool.quantization.weights import base_of
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.planning.made_plan import made_plan

BITS = (0, 16, "2+2", 2, "2+1", 1, 4, "2+2")
"""Of the experts of every layer"""


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint("olmoe", "bfloat16"), name="tiny")


@pytest.fixture(scope="module")
def opened(model: LocatedModel) -> Iterator[OpenedModel]:
    found = open_model(model)
    with found.checkpoint:
        yield found


@pytest.fixture(scope="module")
def profile(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "p.h5"
    record_profile(model, parse_sources(["builtin"]), out=out, tokens=512, seq_len=32)
    return out


@pytest.fixture(scope="module")
def inputs(opened: OpenedModel, profile: Path) -> PackInputs:
    return read_pack_inputs(profile, None, opened.identity, opened.shape)


def mixed(opened: OpenedModel, bits: tuple[Any, ...] = BITS) -> PackPlan:
    assert opened.shape.experts == len(BITS)
    entries = tuple(LayerBits(layer=layer, bits=bits) for layer in opened.shape.layers)
    return made_plan(identity=opened.identity, bits="mixed", expert_bits=entries)


def planned(opened: OpenedModel, inputs: PackInputs, **options: Any) -> PackJob:
    parsed = parse_pack_options(out=Path("nowhere"), **options)
    folder = next(iter(opened.checkpoint.tensors.values())).file.parent
    return plan_pack(parsed, opened, folder, inputs)


def test_the_job_says_which_expert_gets_what(opened: OpenedModel, inputs: PackInputs) -> None:
    job = planned(opened, inputs, plan=mixed(opened), replicas="2,1,rank2")
    layers = opened.shape.layers

    def keys(*experts: int) -> set[tuple[int, int]]:
        return {(layer, expert) for layer in layers for expert in experts}

    found = [(form.role, form.precision.name, set(form.experts)) for form in job.spec.forms]
    assert found == [
        ("primary", "native", keys(1)),
        ("primary", "2+2", keys(2, 7)),
        ("primary", "4", keys(6)),
        ("primary", "2+1", keys(4)),
        ("primary", "2", keys(3)),
        ("primary", "1", keys(5)),
        # A replica is cheaper than the expert: those of 2 bits or fewer have none of 2 bits.
        ("replica", "2", keys(1, 2, 4, 6, 7)),
        ("base", "2of3", keys(4)),
        ("base", "2of4", keys(2, 7)),
        ("replica", "1", keys(1, 2, 3, 4, 6, 7)),
        ("replica", "rank2", keys(1, 2, 3, 4, 5, 6, 7)),
    ]
    assert job.spec.removed == keys(0)
    assert job.tokens is not None and job.spec.made_from["replicas"] == "2,1,rank2"


def test_every_record_of_a_mixture_is_what_its_form_says(
    model: LocatedModel, opened: OpenedModel, profile: Path, tmp_path: Path
) -> None:
    plan = mixed(opened)
    report = pack_bundle(
        model, out=tmp_path / "b", plan=plan, replicas="2,1,rank2", profile=profile
    )
    with BundleReader.open(tmp_path / "b") as reader:
        reader.verify_all()
        manifest = reader.manifest
        assert manifest.removed == tuple((layer, 0) for layer in opened.shape.layers)
        assert sum(manifest.primary_counts.values()) == 8 * len(opened.shape.layers)
        assert manifest.primary_counts["removed"] == len(opened.shape.layers)
        assert manifest.bits == "mixed"
        for layer in opened.shape.layers:
            assert manifest.stored(layer).tolist() == [False] + [True] * 7
            assert [reader.primary_form(layer, e).table.name for e in range(1, 8)] == [
                "native", "2+2", "2", "2+1", "1", "4", "2+2",
            ]  # fmt: skip
        for held in reader.forms:
            record = torch.empty(held.record_size_bytes, dtype=torch.uint8)
            entry = held.table.records[-1]
            reader.read_record_into(entry.layer, entry.expert, record, form=held.index)
            assert entry.eps is not None
            if held.table.precision.kind == "low-rank":
                continue
            exact = opened.experts.read(entry.layer, entry.expert)
            if held.table.role == "base":
                whole = precision_from_bits(f"2+{held.table.precision.of_bits - 2}")  # type: ignore[union-attr, operator]
                wanted = base_of(coded(exact, whole))
            else:
                wanted = coded(exact, held.table.precision)
            assert torch.equal(held.form.encode(wanted), record), held.table.name
        eps = {(t.role, t.name): t.records[-1].eps for t in manifest.forms}
    assert eps["primary", "native"] == 0.0
    assert report.output_error is not None and 0 < report.output_error < 1
    sizes = [t.size_bytes for t in manifest.forms if t.role == "replica"]
    assert report.replica_bytes == sum(sizes)


def test_first_bits_lie_where_the_experts_lie(
    model: LocatedModel, opened: OpenedModel, profile: Path, tmp_path: Path
) -> None:
    pack_bundle(model, out=tmp_path / "b", plan=mixed(opened), profile=profile)
    names = {path.name for path in (tmp_path / "b").glob("*.safetensors")}
    words = ("native", "2o2", "4", "2o1", "2", "1")
    assert names == {f"experts-{word}-00001.safetensors" for word in words} | {
        "skeleton-00001.safetensors"
    }
    with BundleReader.open(tmp_path / "b") as reader:
        for layer, expert in ((0, 2), (1, 7), (1, 4)):
            whole = reader.primary_form(layer, expert)
            base = next(
                held
                for held in reader.forms
                if held.table.role == "base" and (layer, expert) in held.table.experts
            )
            records = [torch.empty(h.record_size_bytes, dtype=torch.uint8) for h in (whole, base)]
            for held, record in zip((whole, base), records, strict=True):
                reader.read_record_into(layer, expert, record, form=held.index)
            assert torch.equal(records[0][: len(records[1])], records[1])


@pytest.mark.parametrize("after", [1, 9, 30])
def test_an_interrupted_mixture_resumes_to_the_same_bytes(
    after: int,
    model: LocatedModel,
    opened: OpenedModel,
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"plan": mixed(opened), "replicas": "1", "profile": profile}
    pack_bundle(model, out=tmp_path / "whole", **options)
    write = BundleWriter.write_record

    def killing(self: BundleWriter, *args: Any, **more: Any) -> None:
        if self.n_written == after:
            raise KeyboardInterrupt
        write(self, *args, **more)

    monkeypatch.setattr(BundleWriter, "write_record", killing)
    with pytest.raises(KeyboardInterrupt):
        pack_bundle(model, out=tmp_path / "b", **options)
    monkeypatch.undo()
    assert pack_bundle(model, out=tmp_path / "b", **options).resumed_records == after
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"bits": "5"}, UsageError, "--bits 5 is not known"),
        ({"bits": "3z"}, UsageError, "only --quantizer hqq makes zero points"),
        ({"bits": "2+2", "quantizer": "hqq"}, UsageError, "need symmetric codes"),
        ({"bits": "mixed"}, UsageError, "bits of each expert come from a plan"),
        ({"skeleton_bits": "2+2"}, UsageError, "only experts are nested"),
        ({"replicas": "2,2"}, UsageError, "--replicas 2,2 is not known"),
        ({"replicas": "rank999"}, UsageError, "wide"),
        ({"bits": "2", "replicas": "4"}, UsageError, "no expert has more bits"),
        ({"sparse_experts": "up2", "replicas": "8"}, UsageError, "beside --sparse-experts up2:4"),
        ({"sparse_experts": "up2", "bits": "4"}, UsageError, "has the bits of all parts"),
        ({"memory": "1MiB"}, MoeToolError, "needs"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any],
    error: type[MoeToolError],
    says: str,
    opened: OpenedModel,
    inputs: PackInputs,
) -> None:
    with pytest.raises(error, match=says) as caught:
        planned(opened, inputs, **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changed", "options", "error", "says"),
    [
        ({"bits": "4", "expert_bits": ()}, {"bits": "mixed"}, UsageError, "the plan is for"),
        ({"skeleton_bits": "8"}, {"skeleton_bits": "4"}, UsageError, "the plan is for"),
        ({"replicas": "2"}, {"replicas": "1"}, UsageError, "which --replicas 1 leaves out"),
        ({"identity": None}, {}, WrongModelError, "tiny"),
        ({"eviction": "pinned+lru"}, {}, UsageError, "there is no profile"),
        ({"bits": "native", "expert_bits": ()}, {"sparse_experts": "up2"}, UsageError, "not know"),
    ],
)
def test_a_plan_that_does_not_fit(
    changed: dict[str, Any],
    options: dict[str, Any],
    error: type[MoeToolError],
    says: str,
    opened: OpenedModel,
) -> None:
    plan = mixed(opened)
    if "identity" in changed:
        changed = {"identity": opened.identity.model_copy(update={"quick": "7" * 64})}
    plan = plan.model_copy(update=changed)
    nothing = read_pack_inputs(None, None, opened.identity, opened.shape)
    with pytest.raises(error, match=says):
        planned(opened, nothing, plan=plan, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"replicas": "2"}, "--replicas are fitted"),
        ({"bits": "2+2"}, "base of nested bits is priced"),
        ({"sparse_experts": "up2"}, "thresholds are measured"),
        ({"bits": "4", "quantizer": "gptq"}, "--quantizer gptq needs the experts"),
    ],
)
def test_what_needs_a_profile(options: dict[str, Any], says: str, opened: OpenedModel) -> None:
    nothing = read_pack_inputs(None, None, opened.identity, opened.shape)
    with pytest.raises(UsageError, match=says) as caught:
        planned(opened, nothing, **options)
    assert "there is no profile" in caught.value.message and "--profile" in str(caught.value.hint)
    assert planned(opened, nothing, bits="4").tokens is None
