"""What every form of an expert's record keeps: bytes out and back, checks, sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.artifacts.form_table import ALIGNMENT_BYTES, Role
from moe_tool.artifacts.moe_shape import ExpertTensor
from moe_tool.artifacts.precision import (
    AnyPrecision,
    KeptPrecision,
    LowRankPrecision,
    channel_precision,
    precision_from_bits,
)
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.channel_form import chunk_hashes
from moe_tool.formats.record_form import RecordForm, record_form
from moe_tool.packing.expert_coding import coded
from moe_tool.quantization.channels import GRID, ChannelExpert, ChannelWeight, Selector
from moe_tool.quantization.hqq import quantize_hqq
from moe_tool.quantization.low_rank import LOW_RANK_TENSORS
from moe_tool.quantization.weights import FloatWeight, base_of
from tests.formats.shapes import shape_of
from tests.kept import draw_kept

H, INNER = 40, 6
SHAPE = shape_of(
    [
        ExpertTensor(name="gate_up_proj", shape=(2 * INNER, H)),
        ExpertTensor(name="gate_up_proj_bias", shape=(2 * INNER,)),
        ExpertTensor(name="down_proj", shape=(H, INNER)),
    ],
    hidden=H,
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    precision: AnyPrecision
    role: Role
    content: Callable[[int, RecordForm[Any]], Any]
    """(seed, form) -> what a record may hold"""
    n_bytes: int
    """Of a record, computed by hand: each segment rounded up to 4096"""
    checked: frozenset[str]
    """Segments whose numbers have to be finite"""


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        each.name: torch.randn(each.shape, generator=draw).to(torch.bfloat16)
        for each in SHAPE.expert_tensors
    }


def _whole(bits: str) -> Callable[[int, RecordForm[Any]], Any]:
    precision = precision_from_bits(bits)

    def hqq(weights: Mapping[str, torch.Tensor], how: Any) -> dict[str, Any]:
        matrices = {name: weight for name, weight in weights.items() if weight.dim() == 2}
        return {n: quantize_hqq(w, how.width_bits, group=how.group) for n, w in matrices.items()}

    has_zeros = precision.kind == "integer" and precision.zeros
    quantize = {"quantize_expert": hqq} if has_zeros else {}
    return lambda seed, _: coded(_tensors(seed), precision, **quantize)


def _kept(name: str) -> Callable[[int, RecordForm[Any]], Any]:
    def content(seed: int, _: RecordForm[Any]) -> Any:
        return {
            "gate_up_proj": draw_kept(name, (2 * INNER, H), seed=seed),
            "gate_up_proj_bias": FloatWeight(values=_tensors(seed)["gate_up_proj_bias"]),
            "down_proj": draw_kept(name, (H, INNER), seed=seed + 9),
        }

    return content


def _base(seed: int, _: RecordForm[Any]) -> Any:
    return base_of(coded(_tensors(seed), precision_from_bits("2+2")))


def _map(seed: int, form: RecordForm[Any]) -> Any:
    draw = torch.Generator().manual_seed(seed)
    shapes = {segment.name: segment.shape for segment in form.layout.segments}
    return {
        name: FloatWeight(values=torch.randn(shapes[name], generator=draw).half())
        for name in LOW_RANK_TENSORS
    }


def _channels(seed: int, form: RecordForm[Any]) -> ChannelExpert:
    rows = form.layout.segments[0].shape
    draw = torch.Generator().manual_seed(seed)
    chunks = torch.randint(0, 60, rows, generator=draw, dtype=torch.uint8)  # no exponent of NaN
    return ChannelExpert(ChannelWeight(chunks=chunks, width_bits=4, group=64, n_hidden=H))


def _selector(seed: int, _: RecordForm[Any]) -> Selector:
    matrix = torch.randn(INNER, H, generator=torch.Generator().manual_seed(seed))
    weights = coded({"selector": matrix}, precision_from_bits("2"))
    return Selector(
        weight=weights["selector"],  # type: ignore[arg-type]
        is_gate=False,
        thresholds=np.linspace(0, 1 + seed, len(GRID), dtype=np.float16).astype(np.float32),
        hashes=chunk_hashes(torch.full((INNER, 8), seed, dtype=torch.uint8)),
        biases={"gate_up_proj_bias": FloatWeight(values=_tensors(seed)["gate_up_proj_bias"])},
    )


PAGE = ALIGNMENT_BYTES
SCALES = frozenset({"gate_up_proj.scales", "down_proj.scales"})
KINDS = {
    "native": Kind(
        precision=precision_from_bits("native"),
        role="primary",
        content=_whole("native"),
        n_bytes=3 * PAGE,
        checked=frozenset(),
    ),
    "4": Kind(  # two planes, scales, twice; a vector
        precision=precision_from_bits("4"),
        role="primary",
        content=_whole("4"),
        n_bytes=7 * PAGE,
        checked=SCALES,
    ),
    "3z": Kind(  # zero points too
        precision=precision_from_bits("3z"),
        role="primary",
        content=_whole("3z"),
        n_bytes=9 * PAGE,
        checked=SCALES | {"gate_up_proj.zeros", "down_proj.zeros"},
    ),
    "int4 zeros": Kind(  # codes, scales and zero points, twice; a vector
        precision=KeptPrecision(
            codes="int4", group_rows=1, group_columns=128, scale="float16", zero="codes"
        ),
        role="primary",
        content=_kept("int4 g128 zeros"),
        n_bytes=7 * PAGE,
        checked=frozenset({"gate_up_proj.scale", "down_proj.scale"}),
    ),
    "mxfp4": Kind(  # none of the patterns has an exponent of 255
        precision=KeptPrecision(codes="e2m1", group_rows=1, group_columns=32, scale="e8m0"),
        role="primary",
        content=_kept("mxfp4"),
        n_bytes=5 * PAGE,
        checked=frozenset(),
    ),
    "1": Kind(
        precision=precision_from_bits("1"),
        role="replica",
        content=_whole("1"),
        n_bytes=5 * PAGE,
        checked=SCALES,
    ),
    "2+2": Kind(  # two planes and two tables of scales, twice
        precision=precision_from_bits("2+2"),
        role="primary",
        content=_whole("2+2"),
        n_bytes=9 * PAGE,
        checked=SCALES | {"gate_up_proj.base_scales", "down_proj.base_scales"},
    ),
    "2of4": Kind(
        precision=precision_from_bits("2+2").base,  # type: ignore[arg-type]
        role="base",
        content=_base,
        n_bytes=5 * PAGE,
        checked=SCALES,
    ),
    "rank3": Kind(
        precision=LowRankPrecision(rank=3),
        role="replica",
        content=_map,
        n_bytes=3 * PAGE,
        checked=frozenset(LOW_RANK_TENSORS),
    ),
    "channels": Kind(
        precision=channel_precision("up2"),
        role="primary",
        content=_channels,
        n_bytes=PAGE,
        checked=frozenset({"channels"}),
    ),
    "selector": Kind(  # a plane, scales, thresholds, hashes, a vector
        precision=channel_precision("up2"),
        role="selector",
        content=_selector,
        n_bytes=5 * PAGE,
        checked=frozenset({"selector.scales", "thresholds"}),
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def form_of(kind: Kind) -> RecordForm[Any]:
    return record_form(SHAPE, kind.precision, kind.role)


def test_a_record_is_as_long_as_its_parts_and_these_are_aligned(kind: Kind) -> None:
    layout = form_of(kind).layout
    assert layout.size_bytes == kind.n_bytes
    ends = [segment.offset + segment.size_bytes for segment in layout.segments]
    assert [segment.offset for segment in layout.segments] == [0, *ends[:-1]]
    assert all(end % ALIGNMENT_BYTES == 0 for end in ends) and ends[-1] == layout.size_bytes
    assert len({segment.name for segment in layout.segments}) == len(layout.segments)


def test_what_is_encoded_comes_back(kind: Kind) -> None:
    """Decoding loses nothing: what comes back makes the same bytes, and other contents others."""
    form = form_of(kind)
    record = form.encode(kind.content(1, form))
    assert record.dtype == torch.uint8 and record.shape == (kind.n_bytes,)
    assert torch.equal(form.encode(form.decode(record)), record)
    assert torch.equal(form.encode(kind.content(1, form)), record)
    assert not torch.equal(form.encode(kind.content(2, form)), record)


def test_padding_is_zero(kind: Kind) -> None:
    form = form_of(kind)
    record = form.encode(kind.content(1, form))
    for segment in form.layout.segments:
        assert not record[
            segment.offset + segment.n_bytes : segment.offset + segment.size_bytes
        ].any()


def test_decoding_copies_nothing(kind: Kind) -> None:
    """A slot is decoded once, whatever records come to lie in it."""
    form = form_of(kind)
    slot = form.encode(kind.content(1, form))
    held = form.decode(slot)
    other = form.encode(kind.content(2, form))
    if kind.role == "selector":  # stays where it is: only its matrix is a view
        assert held.weight.planes[0].data_ptr() == slot.data_ptr()
        return
    slot.copy_(other)
    assert torch.equal(form.encode(held), other)


def test_numbers_that_are_none_are_refused_where_they_matter(kind: Kind) -> None:
    form = form_of(kind)
    whole = form.encode(kind.content(1, form))
    form.require_finite(whole)
    for segment in form.layout.segments:
        for bits in (0x7E00, 0x7C00, 0xFC00):  # NaN, inf, -inf in float16
            record = whole.clone()
            raw = torch.from_numpy(np.array([bits] * (segment.n_bytes // 2), "<u2").view(np.uint8))
            record[segment.offset : segment.offset + len(raw)] = raw
            if segment.name in kind.checked:
                with pytest.raises(CorruptArtifactError, match=segment.name) as error:
                    form.require_finite(record)
                assert error.value.hint
            else:
                form.require_finite(record)


def test_padding_is_not_looked_at(kind: Kind) -> None:
    form = form_of(kind)
    record = form.encode(kind.content(1, form))
    for segment in form.layout.segments:
        record[segment.offset + segment.n_bytes : segment.offset + segment.size_bytes] = 0xFF
    form.require_finite(record)


@pytest.mark.parametrize("name", ["channels", "selector"])
def test_channels_of_experts_without_any_are_refused(name: str) -> None:
    shape = shape_of([ExpertTensor(name="up_proj", shape=(4, 4))])
    with pytest.raises(CorruptArtifactError, match="no joined gate"):
        record_form(shape, KINDS[name].precision, KINDS[name].role)
