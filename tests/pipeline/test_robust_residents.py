"""Residents chosen between the mean and the worst domain, from the profile to the session."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.bundle_sections import RESIDENT_USE, Section
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.budget.request import parse_memory
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.formats.policy_names import read_plan
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.hardware.shipped import shipped_profile
from moe_tool.inspection.describe_artifact import describe_artifact
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.pack_options import parse_pack_options
from moe_tool.planning.build_plan import build_plan
from moe_tool.planning.plan_request import PlanRequest, check_request
from moe_tool.planning.plan_sources import PlanSources, read_sources
from moe_tool.planning.robust_share import share_for_pack
from moe_tool.policies.cheapest_residents import cheapest_residents
from moe_tool.policies.leave_one_out import SHARES
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.policies.robust_use import robust_use
from moe_tool.profiling.recorder import record_profile
from moe_tool.progress import SILENT
from moe_tool.runtime.price_list import expert_use, price_book, resident_use
from moe_tool.runtime.residency import frozen_rooms, n_slots_min
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle

REQUEST = PlanRequest(memory=parse_memory("50%"), context=64, bits="native", max_kl=2.0)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint("mixtral", "bfloat16"), name="tiny")


@pytest.fixture(scope="module")
def profile(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    (folder / "digits.txt").write_text(" ".join(str(n * n) for n in range(900)))
    texts = ["builtin", f"digits={folder / 'digits.txt'}"]
    record_profile(model, parse_sources(texts), out=folder / "p.h5", tokens=256, seq_len=32)
    return folder / "p.h5"


@pytest.fixture(scope="module")
def sources(profile: Path) -> Iterator[PlanSources]:
    with ProfileReader.open(profile) as reader:
        yield read_sources(reader)


def _plan(sources: PlanSources, share: float | None) -> PackPlan:
    machine = shipped_profile("laptop-16gb")
    slow = tuple(row.model_copy(update={"bytes_per_s": 1e6}) for row in machine.disk)
    machine = machine.model_copy(update={"disk": slow})
    report = build_plan(sources, machine, replace(REQUEST, robust=share))
    assert any(f"--robust {report.plan.robust:g}" in note for note in report.notes)
    return report.plan


def test_domains_add_up_to_the_mean(sources: PlanSources) -> None:
    assert len(sources.domain_tokens) == 3  # docs and code are built in
    for layer, mean in sources.use.items():
        uses = [each.squared_gate for each in sources.by_domain[layer]]
        found = np.average(uses, 0, sources.domain_tokens)
        assert found == pytest.approx(mean.squared_gate)


def test_a_plans_share_chooses_its_residents_and_no_share_its_own(
    sources: PlanSources, tmp_path: Path
) -> None:
    plans = {share: _plan(sources, share) for share in (0.0, 1.0)}
    assert plans[0.0].robust == 0 and plans[1.0].robust == 1
    assert plans[0.0].policy is not None
    assert plans[0.0].forms != plans[1.0].forms
    chosen = _plan(sources, None)
    assert chosen.robust in SHARES
    assert _plan(sources, chosen.robust) == chosen
    write_json_artifact(tmp_path / "p.json", plans[1.0])
    assert read_plan(tmp_path / "p.json") == plans[1.0]
    assert "--robust 1" in str(
        describe_artifact(tmp_path / "p.json", verify=False, progress=SILENT).facts["residents"]
    )


def test_a_plan_without_a_share_is_written_as_before(sources: PlanSources) -> None:
    plan = _plan(sources, 0.0)
    assert "robust" not in plan.model_dump_json()
    assert PackPlan.model_validate_json(plan.model_dump_json()).robust == 0


@pytest.fixture(scope="module")
def bundles(
    model: LocatedModel, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    options = {"unasked": {}, "0": {"robust": 0.0}, "0.5": {"robust": 0.5}, "1": {"robust": 1.0}}
    for name, given in options.items():
        pack_bundle(model, out=folder / name, profile=profile, **given)
    return {name: folder / name for name in options}


def _manifest(bundle: Path) -> BundleManifest:
    with BundleReader.open(bundle) as reader:
        return reader.manifest


def test_a_bundle_of_no_share_has_the_same_bytes(bundles: dict[str, Path]) -> None:
    names = sorted(path.name for path in bundles["0"].iterdir())
    assert names == sorted(path.name for path in bundles["unasked"].iterdir())
    for name in names:
        assert (bundles["0"] / name).read_bytes() == (bundles["unasked"] / name).read_bytes()
    manifest = _manifest(bundles["0"])
    assert RESIDENT_USE not in manifest.sections and "robust" not in manifest.made_from
    mean, chosen_by = expert_use(manifest), resident_use(manifest)
    assert mean is not None and chosen_by is not None
    for layer, use in mean.items():
        assert use.squared_gate.tolist() == chosen_by[layer].squared_gate.tolist()


def test_a_bundle_has_the_use_of_its_share_and_the_mean_as_its_price(
    bundles: dict[str, Path], sources: PlanSources
) -> None:
    manifest = _manifest(bundles["0.5"])
    assert manifest.prices == _manifest(bundles["0"]).prices
    mean, chosen_by = expert_use(manifest), resident_use(manifest)
    assert mean is not None and chosen_by is not None
    for layer, use in mean.items():
        wanted = robust_use(use, sources.by_domain[layer], 0.5)
        assert chosen_by[layer].squared_gate == pytest.approx(wanted.squared_gate)
        assert chosen_by[layer].load == pytest.approx(wanted.load)
        assert (chosen_by[layer].squared_gate >= use.squared_gate / 2).all()
    assert "--robust 0.5" in str(
        describe_artifact(bundles["0.5"], verify=False, progress=SILENT).facts["residents"]
    )


def test_a_run_holds_the_residents_of_the_bundles_use(
    bundles: dict[str, Path],
) -> None:
    choice = parse_miss_policy("priced:kl=inf")  # no miss is read
    held: dict[str, list[set[tuple[int, int]]]] = {"0": [], "1": []}
    for name, found in held.items():
        manifest = _manifest(bundles[name])
        book, use = price_book(manifest), resident_use(manifest)
        assert book is not None and use is not None
        free, size = n_slots_min(manifest), manifest.primaries[0].record_size_bytes
        for n_slots in range(free + 1, len(manifest.primary_records)):
            (room,) = frozen_rooms(manifest, (n_slots,), choice, book)
            wanted = cheapest_residents(book, use, room_bytes=(n_slots - free) * size)
            found.append(set(room.pinned))
            assert found[-1] == set(wanted.by_form[0])
    assert held["0"] != held["1"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body.update(share=0.0),
        lambda body: body["layers"].pop(),
        lambda body: body["layers"][0]["load"].pop(),
        lambda body: body["layers"][0].update(layer=5),
        lambda body: body["layers"][0]["squared_gate"].__setitem__(0, -1.0),
        lambda body: body["layers"][0]["load"].__setitem__(0, 1.5),
    ],
)
def test_a_damaged_use_is_refused(bundles: dict[str, Path], damage: Callable) -> None:
    raw = _manifest(bundles["0.5"]).model_dump(mode="json")
    damage(raw["sections"][RESIDENT_USE]["body"])
    section = Section(**raw["sections"][RESIDENT_USE])
    with pytest.raises(ValueError):
        manifest = _manifest(bundles["0.5"])
        BundleManifest(
            **{
                **{name: getattr(manifest, name) for name in BundleManifest.model_fields},
                "sections": {**manifest.sections, RESIDENT_USE: section},
            }
        )


def test_what_has_no_domains_or_no_misses_is_refused(model: LocatedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is none"):
        pack_bundle(model, out=tmp_path / "b", robust=0.5)
    for share in (-0.5, 1.5, float("nan")):
        with pytest.raises(UsageError, match="--robust"):
            parse_pack_options(out=tmp_path / "b", robust=share)
    for wrong in ({"robust": 1.5}, {"robust": 0.5, "max_kl": None}, {"robust": float("nan")}):
        with pytest.raises(UsageError, match="--robust"):
            check_request(replace(REQUEST, **wrong))  # type: ignore[arg-type]


def test_a_pack_follows_its_plan_or_what_is_asked_for(
    model: LocatedModel, profile: Path, sources: PlanSources, tmp_path: Path
) -> None:
    plan = _plan(sources, 1.0)
    pack_bundle(model, out=tmp_path / "b", profile=profile, plan=plan)
    use = _manifest(tmp_path / "b").resident_use
    assert use is not None and use.share == 1
    with ProfileReader.open(profile) as reader:
        assert share_for_pack(reader, "native", "4,2") in SHARES
        assert share_for_pack(reader, "2+2", "") in SHARES
