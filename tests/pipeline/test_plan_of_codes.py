"""plan and simulate of a quantized checkpoint: sizes of its own codes, from the profile alone."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from moe_tool.artifacts.precision import NativePrecision
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.formats.record_form import record_form
from moe_tool.models.bundle_skeleton import bundle_loader, open_bundle_skeleton
from moe_tool.planning.model_costs import native_bits, record_size
from tests.models.stored_formats.test_coded_models import write_pair
from tests.pipeline.commands import Done, moe_tool

SHIPPED = ("--hardware", "laptop-16gb")


def done(*arguments: str | Path, folder: Path) -> Done:
    found = moe_tool(*arguments, "--json", folder=folder)
    assert found.code == 0, f"{arguments}:\n{found.stderr}"
    return found


@pytest.fixture(scope="module", params=["fp8", "mxfp4", "int4"])
def profiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_pair(request.param, folder)
    (folder / "words.txt").write_text("the list of the items is a list of words. " * 400)
    data = ("--data", "words=./words.txt", "--seq-len", "32", "--tokens", "512")
    done("profile", folder / "coded", *data, "--out", "p.h5", folder=folder)
    return folder


def plan_and_pack(folder: Path, out: Path, *bits: str) -> dict[str, Any]:
    """Return the plan of a bundle packed as planned at `out`/b."""
    plan = out / "x.plan.json"
    options = ("--memory", "60%", "--context", "64", *SHIPPED, *bits)
    done("plan", "p.h5", *options, "--out", plan, folder=folder)
    packed = ("pack", folder / "coded", "--plan", plan, "--profile", "p.h5", "--out", out / "b")
    done(*packed, folder=folder)
    found: dict[str, Any] = json.loads(plan.read_text())
    return found


def lines_of(plan: dict[str, Any]) -> dict[str, int]:
    return {line["name"].split(",")[0]: line["size_bytes"] for line in plan["lines"]}


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["native", "4"])
def test_sizes_planned_are_those_packed_and_run(profiled: Path, bits: str, tmp_path: Path) -> None:
    plan = plan_and_pack(profiled, tmp_path, "--bits", bits)
    with BundleReader.open(tmp_path / "b") as bundle:
        (held,) = bundle.forms
        assert held.table.precision.kind == ("kept" if bits == "native" else "integer")
        with open_bundle_skeleton(bundle) as skeleton:
            assert lines_of(plan)["skeleton"] == bundle_loader(bundle, skeleton).held_bytes
    with ProfileReader.open(profiled / "p.h5") as profile:
        assert record_size(profile.header, bits) == held.record_size_bytes
    n_slots = plan["prediction"]["expert_slots"]
    slots = next(size for name, size in lines_of(plan).items() if "expert slots" in name)
    assert slots == n_slots * held.record_size_bytes
    run = ("run", tmp_path / "b", "--prompt", "the list", "--max-tokens", "4", "--context", "64")
    made = done(*run, folder=profiled).fields
    assert made["memory_budget_bytes"] == plan["memory_bytes"]


@pytest.mark.slow
def test_a_run_of_codes_is_replayed_hit_for_hit(profiled: Path, tmp_path: Path) -> None:
    plan_and_pack(profiled, tmp_path, "--bits", "native")
    run = ("run", tmp_path / "b", "--prompt", "the list", "--max-tokens", "8", "--memory", "50%")
    made = done(*run, "--record-trace", "run.h5", folder=profiled).fields
    replayed = done("simulate", "run.h5", *SHIPPED, folder=profiled).fields
    assert replayed["hits"] == replayed["predicted_hits"] == made["hits"] > 0
    assert replayed["predicted_tokens_per_second"] > 0


def test_budgets_of_a_simulation_count_codes(profiled: Path) -> None:
    memory = ("--memory", "50%", "--eviction", "lru", *SHIPPED)
    of_codes = done("simulate", "p.h5", "--bits", "native", *memory, folder=profiled).fields
    with ProfileReader.open(profiled / "p.h5") as profile:
        size = record_size(profile.header, "native")
        of_floats = record_form(profile.header.shape, NativePrecision()).layout.size_bytes
    assert size < of_floats
    assert {row["expert_bytes"] for row in of_codes["rows"]} == {
        row["slots"] * size for row in of_codes["rows"]
    }


SCALE_BITS = {"float32": 32, "bfloat16": 16, "e8m0": 8}


def bits_by_hand(profile: ProfileReader) -> Fraction:
    """Bits of a weight's code, and of its share of a scale."""
    kept, bits, n_weights = profile.header.kept, 0, 0
    assert kept is not None and (kept.global_scale, kept.zero) == ("none", "none")
    for rows, columns in (
        t.shape for t in profile.header.shape.expert_tensors if len(t.shape) == 2
    ):
        grid = -(-rows // kept.group_rows) * -(-columns // (kept.group_columns or columns))
        bits += rows * columns * kept.width_bits + grid * SCALE_BITS[kept.scale]
        n_weights += rows * columns
    return Fraction(bits, n_weights)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["2.5", "4", "16"])
def test_an_average_counts_the_bits_of_codes(profiled: Path, average: str, tmp_path: Path) -> None:
    """The bits of kept experts are those of their records, not 16; no rounding is chosen that has
    as many."""
    plan = tmp_path / "x.plan.json"
    options = ("--average-bits", average, "--context", "64", *SHIPPED, "--out", plan)
    made = done("plan", "p.h5", *options, folder=profiled)
    with ProfileReader.open(profiled / "p.h5") as profile:
        native, kept = native_bits(profile.header), profile.header.kept
        assert native == bits_by_hand(profile)
        size = {16: record_size(profile.header, "native"), 0: 0}
        size |= {bits: record_size(profile.header, str(bits)) for bits in (1, 2, 3, 4, 8)}
    assert kept is not None
    if profiled.name.startswith("mxfp4"):
        assert native == Fraction(17, 4)
    bits = [each for row in json.loads(plan.read_text())["expert_bits"] for each in row["bits"]]
    assert set(bits) <= {0, 1, 2, 3, 16} | ({4} if kept.width_bits == 8 else set())
    counted = sum(native if each == 16 else each for each in bits) / len(bits)
    (chosen, *others) = made.fields["allocations"]
    assert chosen["average_bits"] == pytest.approx(float(counted)) and counted <= float(average)
    if average == "16":
        assert set(bits) <= {0, 16} and chosen["nats"] == 0  # 0: tokens want no such expert
    elif kept.width_bits == 4:
        assert 16 in bits and len(set(bits)) > 1  # kept codes among fewer bits, the useful case
    for other in others:
        assert other["nats"] >= chosen["nats"] and set(map(int, other["experts"])) <= {*size}
        assert other["average_bits"] <= math.ceil(native)
    left_out = "8" if kept.width_bits == 8 else "4 and 8"
    lines = [line for line in made.stderr.splitlines() if "left out" in line]
    assert len(lines) == 1 and f"left out: {left_out} bits" in lines[0] and kept.name in lines[0]
    packed = done(
        "pack", profiled / "coded", "--plan", plan, "--out", tmp_path / "b", folder=profiled
    )
    assert packed.fields["expert_bytes"] == chosen["expert_bytes"]
    assert chosen["expert_bytes"] == sum(size[each] for each in bits)


def test_a_plan_without_bits_rounds_no_codes_to_as_many(profiled: Path, tmp_path: Path) -> None:
    asked = ("--memory", "60%", "--context", "64", "--max-loss", "900%", *SHIPPED)
    made = done("plan", "p.h5", *asked, "--out", tmp_path / "x.json", folder=profiled)
    with ProfileReader.open(profiled / "p.h5") as profile:
        kept = profile.header.kept
    assert kept is not None
    assert made.fields["plan"]["bits"] in (("native", "4") if kept.width_bits == 8 else ("native",))
    assert ("left out: 8 bits" if kept.width_bits == 8 else "left out: 8 and 4") in made.stderr
