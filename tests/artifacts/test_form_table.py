"""Tables of records: any mixture that makes sense is accepted, and contradictions are named."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from moe_tool.artifacts.bundle_manifest import (
    BundleFile,
    BundleManifest,
    Calibration,
    LayerHeat,
    LayerPrices,
    SkeletonLinear,
    TunedWeights,
)
from moe_tool.artifacts.bundle_sections import LearnedPruning, QualityFigure, Section
from moe_tool.artifacts.form_table import FormRecord, FormTable, Role, check_form_tables
from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import (
    AnyPrecision,
    ChannelPrecision,
    IntegerPrecision,
    LowRankPrecision,
    NativePrecision,
    precision_from_bits,
    replica_precisions,
)
from moe_tool.artifacts.schema import FrozenModel

SHAPE = MoeShape(
    model_type="mixtral",
    n_decoder_layers=3,
    layers=(0, 2),
    experts=3,
    top_k=1,
    hidden=8,
    vocabulary=8,
    dtype="float32",
    expert_tensors=(ExpertTensor(name="up_proj", shape=(8, 8)),),
)
KEYS = [(layer, expert) for layer in SHAPE.layers for expert in range(SHAPE.experts)]
PAGE = 4096
NESTED = precision_from_bits("2+2")
RANK4 = LowRankPrecision(rank=4)
UP2 = ChannelPrecision(selected_by="up", selector_bits=2)


def table(
    precision: AnyPrecision | str,
    keys: Iterable[tuple[int, int]] = tuple(KEYS),
    role: Role = "primary",
    *,
    file: str | None = None,
    size: int = 2 * PAGE,
    pitch: int = 2 * PAGE,
) -> FormTable:
    """Return a table whose records lie one behind the other in a file of its own."""
    held = precision_from_bits(precision) if isinstance(precision, str) else precision
    file = file or f"{role}-{held.name.replace(':', 'x').replace('+', 'o')}"
    return FormTable(
        role=role,
        precision=held,
        record_size_bytes=size,
        records=tuple(
            FormRecord(layer=layer, expert=expert, file=file, offset=at * pitch, xxh3="0" * 16)
            for at, (layer, expert) in enumerate(keys)
        ),
    )


def base(keys: Iterable[tuple[int, int]] = tuple(KEYS)) -> FormTable:
    assert NESTED.base is not None
    return table(NESTED.base, keys, "base", file="primary-2o2", size=PAGE)


def check(*tables: FormTable, removed: Iterable[tuple[int, int]] = (), room: int = 100) -> None:
    files = {record.file for each in tables for record in each.records}
    check_form_tables(tables, tuple(removed), SHAPE, dict.fromkeys(files, room * PAGE))


@pytest.mark.parametrize(
    ("tables", "removed"),
    [
        ([table("4")], []),
        ([table("4", KEYS[:2]), table("2", KEYS[2:5]), table("1", KEYS[5:])], []),
        ([table("4", KEYS[1:])], KEYS[:1]),
        ([table("native"), table("2", role="replica"), table(RANK4, KEYS[:1], "replica")], []),
        # replicas of some, beside several widths and removed experts
        ([table("8", KEYS[1:3]), table("3", KEYS[3:]), table("2", KEYS[2:4], "replica")], KEYS[:1]),
        # nested experts beside others, with replicas
        (
            [table("8", KEYS[:2]), table(NESTED, KEYS[2:]), table("3", KEYS[:3], "replica"),
             base(KEYS[2:])],
            [],
        ),
        ([table(UP2), table(UP2, role="selector")], []),
        # channels beside whole experts, replicas and removed ones
        (
            [table("8", KEYS[1:2]), table(UP2, KEYS[2:]), table("1", KEYS[1:4], "replica"),
             table(UP2, KEYS[2:], "selector")],
            KEYS[:1],
        ),
    ],
)  # fmt: skip
def test_what_no_mathematics_forbids_is_legal(
    tables: list[FormTable], removed: list[tuple[int, int]]
) -> None:
    check(*tables, removed=removed)


@pytest.mark.parametrize(
    ("tables", "removed", "says"),
    [
        ([table("4", KEYS[1:])], [], "every expert exactly once"),
        ([table("4")], KEYS[:1], "every expert exactly once"),
        ([table("4", KEYS[:5]), table("2", KEYS[4:])], [], "every expert exactly once"),
        ([table("4", [*KEYS[:5], (1, 0)])], [], "every expert exactly once"),
        ([table("4", [*KEYS[:5], (2, 3)])], [], "every expert exactly once"),
        ([table("4", KEYS[1:]), table("2", KEYS[:1], "replica")], KEYS[:1], "replica 2 lists"),
        ([table("4"), table("2", [KEYS[0], KEYS[0]], "replica")], [], "an expert twice"),
        ([table("4", role="replica"), table("4")], [], "not in the order"),
        ([table("4", KEYS[:3]), table("4", KEYS[3:], file="x")], [], "the same form"),
        ([table(LowRankPrecision(rank=2))], [], "no form for the role primary"),
        ([table("4"), table("native", role="replica")], [], "no form for the role replica"),
        ([table("4"), table(NESTED, role="replica")], [], "no form for the role replica"),
        ([table("4"), table("2", role="base")], [], "no form for the role base"),
        ([table("4"), table("2", role="replica", file="primary-4")], [], "records of two forms"),
        ([table("4", pitch=PAGE)], [], "overlap in primary-4"),
        ([table("4", pitch=PAGE + 8)], [], "not aligned"),
        ([table("4", size=PAGE + 8)], [], "record_size_bytes is not aligned"),
        ([table(NESTED)], [], "go together"),
        ([table("4"), base()], [], "go together"),
        ([table(NESTED), base(KEYS[1:])], [], "do not lie where"),
        ([table(NESTED), base(KEYS[::-1])], [], "do not lie where"),
        ([table(UP2)], [], "selectors and channels"),
        ([table("4"), table(UP2, role="selector")], [], "selectors and channels"),
        ([table(UP2), table(UP2, KEYS[1:], "selector")], [], "not those of the experts"),
    ],
)
def test_a_contradiction_is_named(
    tables: list[FormTable], removed: list[tuple[int, int]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        check(*tables, removed=removed)


def test_a_record_beyond_its_file_is_named() -> None:
    check(table("4"), room=12)
    with pytest.raises(ValueError, match=r"layer 2 expert 2 ends beyond primary-4"):
        check(table("4"), room=11)


def test_a_damaged_number_of_experts_makes_no_large_set() -> None:
    """2**31 experts are counted, not listed."""
    shape = SHAPE.model_copy(update={"experts": 2**31})
    with pytest.raises(ValueError, match="exactly once"):
        check_form_tables([table("4")], (), shape, {"primary-4": 100 * PAGE})


def test_a_bundle_without_any_expert_is_none() -> None:
    with pytest.raises(ValueError, match="every expert was removed"):
        check(
            FormTable(
                role="primary",
                precision=precision_from_bits("4"),
                record_size_bytes=PAGE,
                records=(),
            ),
            removed=KEYS,
        )


def test_names_tell_all_forms_apart() -> None:
    """A base is not called as a replica of the same bits."""
    words = ["native", "8", "4", "3", "2", "1", "2:128", "3z", "2+2", "2+1", "2+2:128"]
    precisions: list[Any] = [precision_from_bits(word) for word in words]
    assert [each.name for each in precisions] == words
    bases = [each.base for each in precisions if each.base is not None]
    assert [each.name for each in bases] == ["2of4", "2of3", "2of4:128"]
    assert len({each.name for each in (*precisions, *bases)}) == len(words) + 3


def test_the_dearest_form_comes_first() -> None:
    found = replica_precisions("rank4,2:128,1,2,rank16,8")
    assert [each.name for each in found] == ["8", "2", "2:128", "1", "rank16", "rank4"]


def test_zero_points_are_those_of_codes() -> None:
    assert NativePrecision().with_zeros(True) == NativePrecision()
    assert LowRankPrecision(rank=2).with_zeros(True) == LowRankPrecision(rank=2)
    assert IntegerPrecision(width_bits=3).with_zeros(True).name == "3z"
    assert UP2.with_zeros(True).selector.zeros and not UP2.with_zeros(True).rows.zeros


@pytest.mark.parametrize(
    "model",
    [
        BundleManifest, FormTable, FormRecord, BundleFile, SkeletonLinear, LayerHeat, LayerPrices,
        Calibration, TunedWeights, Section, LearnedPruning, QualityFigure, IntegerPrecision,
        ChannelPrecision, LowRankPrecision,
    ],
)  # fmt: skip
def test_every_field_is_described(model: type[FrozenModel]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats" / "bundle.md").read_text()
    assert [name for name in model.model_fields if f"`{name}`" not in text] == []
