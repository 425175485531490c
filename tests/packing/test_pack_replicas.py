"""Replicas in a bundle: what they hold, what they are worth, a resume, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.artifacts.pack_plan import PackPlan, PlannedForm
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.models.architecture import open_model
from moe_tool.models.layer_stream import LayerStream
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.quantization.round_to_nearest import dequantize, round_trip
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.price_list import price_book
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.planning.made_plan import made_plan

LIST = "4,2:128,1,rank8,rank2"


class Killed(BaseException):
    """What a test interrupts with."""


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny")


@pytest.fixture(scope="module")
def profile(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "p.h5"
    record_profile(model, parse_sources(["builtin"]), out=out, tokens=1024, seq_len=32)
    return out


@pytest.fixture(scope="module")
def bundle(model: LocatedModel, profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    report = pack_bundle(model, out=out, replicas=LIST, profile=profile)
    assert report.replica_bytes > 0
    return out


def test_every_form_of_every_expert_is_there_and_verified(
    bundle: Path, model: LocatedModel
) -> None:
    opened = open_model(model)
    with opened.checkpoint, BundleReader.open(bundle) as reader:
        assert [held.table.name for held in reader.forms] == [
            "native",
            "4",
            "2:128",
            "1",
            "rank8",
            "rank2",
        ]
        reader.verify_all()
        for level, width, group in ((1, 4, 64), (2, 2, 128), (3, 1, 64)):
            held = reader.forms[level]
            record = torch.empty(held.record_size_bytes, dtype=torch.uint8)
            layer, expert = held.table.records[5].layer, held.table.records[5].expert
            reader.read_record_into(layer, expert, record, form=level)
            found = held.form.decode(record)["down_proj"]
            assert isinstance(found, IntegerWeight)
            wanted = round_trip(opened.experts.read(layer, expert)["down_proj"], width, group=group)
            assert torch.equal(dequantize(found), wanted)


def test_prices_are_those_of_the_records_on_tokens_that_they_were_not_made_from(
    bundle: Path, model: LocatedModel
) -> None:
    """Bits are ordered as widths are, and a price is what the form does to inputs like those."""
    opened = open_model(model)
    with opened.checkpoint, BundleReader.open(bundle) as reader:
        tables = reader.manifest.cheaper
        means = [np.mean([record.eps for record in table.records]) for table in tables]
        assert means[0] < means[1] < means[2]
        assert means[3] < means[4] <= 1.05
        layer = reader.manifest.shape.layers[0]
        stream = LayerStream(model.folder, opened.checkpoint)
        module = next(each.experts for each in stream.moe_layers if each.layer == layer)
        exact = opened.experts.read(layer, 0)
        x = torch.randn(64, reader.manifest.shape.hidden, generator=torch.manual_seed(0))
        truth = expert_forward(
            module, {name: FloatWeight(values=value) for name, value in exact.items()}, x
        )
        for level in (1, 2):
            held = reader.forms[level]
            record = torch.empty(held.record_size_bytes, dtype=torch.uint8)
            reader.read_record_into(layer, 0, record, form=level)
            answer = expert_forward(module, held.form.decode(record), x)
            error = float((truth - answer).norm() / truth.norm())
            eps = reader.record_entry(layer, 0, form=level).eps
            assert eps == pytest.approx(error, rel=0.5)


@pytest.mark.parametrize("after", [0, 1, 7, 30])
def test_an_interrupted_pack_resumes_to_the_same_bytes(
    after: int,
    bundle: Path,
    model: LocatedModel,
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = BundleWriter.write_record

    def killing(self: BundleWriter, *args: Any, **more: Any) -> None:
        if self.n_written == after:
            raise Killed
        write(self, *args, **more)

    monkeypatch.setattr(BundleWriter, "write_record", killing)
    with pytest.raises(Killed):
        pack_bundle(model, out=tmp_path / "b", replicas=LIST, profile=profile)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="replicas"):
        pack_bundle(model, out=tmp_path / "b", profile=profile)
    pack_bundle(model, out=tmp_path / "b", replicas=LIST, profile=profile)
    for path in sorted(bundle.iterdir()):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "not known"),
        ("2:100", "not known"),
        ("rank0", "not known"),
        ("2,2", "not known"),
        ("rank16,rank16", "not known"),
        ("rank" + "9" * 5000, "not known"),
        ("rank1000", "wide"),
    ],
)
def test_replicas_that_are_none_are_refused(
    text: str, says: str, model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        pack_bundle(model, out=tmp_path / "b", replicas=text, profile=profile)


def test_replicas_need_a_profile(model: LocatedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no profile"):
        pack_bundle(model, out=tmp_path / "b", replicas="2")


def test_a_damaged_replica_is_named(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    copy.mkdir()
    for path in bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with BundleReader.open(copy) as reader:
        entry = reader.forms[4].table.records[3]
    data = bytearray((copy / entry.file).read_bytes())
    data[entry.offset + 17] ^= 64
    (copy / entry.file).write_bytes(data)
    with BundleReader.open(copy) as reader:
        out = torch.empty(reader.forms[4].record_size_bytes, dtype=torch.uint8)
        with pytest.raises(CorruptArtifactError, match=entry.file):
            reader.read_record_into(entry.layer, entry.expert, out, form=4)


def _planned(bundle: Path, policy: str, n_disk_only: int) -> PackPlan:
    manifest = BundleReader.open(bundle).manifest
    layers = manifest.shape.layers
    forms = (
        PlannedForm(
            role="primary",
            precision="native",
            record_bytes=4096,
            resident=((layers[0], 1),),
            n_disk_only=9,
        ),
        PlannedForm(
            role="replica",
            precision="4",
            record_bytes=4096,
            resident=((layers[-1], 2), (layers[0], 0)),
            n_disk_only=n_disk_only,
        ),
        PlannedForm(
            role="replica", precision="1", record_bytes=4096, resident=(), n_disk_only=n_disk_only
        ),
    )
    return made_plan(
        identity=manifest.identity,
        bits="native",
        policy=policy,
        replicas="4,1",
        max_kl=90.0,
        forms=forms,
    )


def test_a_plan_that_reads_no_replica_packs_only_those_that_stay(
    bundle: Path, model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    plan = _planned(bundle, "priced:kl=inf", n_disk_only=0)
    out = tmp_path / "b"
    report = pack_bundle(model, out=out, replicas="4,1", profile=profile, plan=plan)
    with BundleReader.open(out) as reader:
        (table,) = reader.manifest.cheaper  # of the form with one bit none stays
        assert {(r.layer, r.expert) for r in table.records} == set(plan.forms[1].resident)
        assert report.replica_bytes == 2 * table.record_size_bytes
        reader.verify_all()
        book = price_book(reader.manifest)
        assert book is not None
        stored = [
            (layer, expert)
            for layer, each in book.layers.items()
            for expert in np.isfinite(each.eps[1]).nonzero()[0]
        ]
        assert set(stored) == set(plan.forms[1].resident)
    options = run_options(memory="50%", policy="priced:kl=inf", context=64, shadow=0)
    with open_session(out, options) as session:
        generate_ids(session, [[256, 84, 104]], GenerateOptions(max_tokens=6, ignore_eos=True))
        counters = session.runner.stats.decode
        assert counters.bytes_read == 0 and counters.replica_answers + counters.drops > 0


def test_a_plan_that_may_read_replicas_packs_all(
    bundle: Path, model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    plan = _planned(bundle, "priced:nats-per-mb=0.1", n_disk_only=3)
    pack_bundle(model, out=tmp_path / "b", replicas="4,1", profile=profile, plan=plan)
    manifest = BundleReader.open(tmp_path / "b").manifest
    assert [len(table.records) for table in manifest.cheaper] == [len(manifest.primary_records)] * 2


def test_gptq_makes_records_of_the_same_kind_that_err_less(
    bundle: Path, model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    pack_bundle(model, out=out, bits="4", quantizer="gptq", replicas="2", profile=profile)
    plain = tmp_path / "plain"
    pack_bundle(model, out=plain, bits="4", replicas="2", profile=profile)
    with BundleReader.open(out) as reader, BundleReader.open(plain) as nearest:
        reader.verify_all()
        assert reader.manifest.made_from["quantizer"] == "gptq"
        assert reader.forms[0].record_size_bytes == nearest.forms[0].record_size_bytes
        eps = [np.mean([each.eps for each in r.forms[1].table.records]) for r in (reader, nearest)]
        assert eps[0] < 0.9 * eps[1]
        ours, theirs = (
            torch.empty(r.forms[0].record_size_bytes, dtype=torch.uint8) for r in (reader, nearest)
        )
        layer = reader.manifest.shape.layers[0]
        reader.read_record_into(layer, 0, ours, form=0)
        nearest.read_record_into(layer, 0, theirs, form=0)
        assert not torch.equal(ours, theirs)  # the experts themselves too


def test_gptq_needs_a_profile_where_there_are_codes(model: LocatedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gptq"):
        pack_bundle(model, out=tmp_path / "b", bits="4", quantizer="gptq")
    pack_bundle(model, out=tmp_path / "c", bits="native", quantizer="gptq")  # nothing to round
