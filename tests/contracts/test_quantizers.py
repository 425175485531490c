"""Contract of quantizers, run over all of them."""

from types import SimpleNamespace

import pytest
import torch

from moe_tool.artifacts.moe_shape import ExpertTensor
from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.record_form import record_form
from moe_tool.packing.expert_coding import coded as coded_expert
from moe_tool.quantization.bit_packing import unpack
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantizers.inputs import LAST, ExpertInputs
from moe_tool.quantizers.registry import QUANTIZERS, parse_quantizer
from tests.formats.shapes import shape_of

HIDDEN, INNER = 100, 72  # with groups of 32, 64 and 128 the last one of a row is short
FIRST = "gate_up_proj"
EVERY = pytest.mark.parametrize("spec", QUANTIZERS.values(), ids=list(QUANTIZERS))
WIDTHS = pytest.mark.parametrize("width_bits", [1, 2, 3, 4, 8])


def _apply_gate(joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


MODULE = SimpleNamespace(has_gate=True, _apply_gate=_apply_gate, has_post_expert_norm=False)


def _expert(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        FIRST: torch.randn(2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5,
        LAST: torch.randn(HIDDEN, INNER, generator=generator) / INNER**0.5,
    }


def _inputs(expert: dict[str, torch.Tensor], n_tokens: int = 600) -> ExpertInputs:
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    sizes = torch.linspace(0.1, 3, HIDDEN)  # inputs matter more or less
    tokens = torch.randn(n_tokens, HIDDEN, generator=generator) @ mix * sizes
    return ExpertInputs(MODULE, expert, tokens)


def _precision(spec, width_bits, group=64, **more):
    return IntegerPrecision(width_bits=width_bits, group=group, zeros=spec.makes_zeros, **more)


def _values(coded):
    return {name: dequantize(weight) for name, weight in coded.items()}


@EVERY
@WIDTHS
@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_and_scales_have_the_shapes_they_say_and_are_finite(spec, width_bits, group):
    expert = _expert()
    coded = spec.make(_inputs(expert))(expert, _precision(spec, width_bits, group))
    assert set(coded) == {FIRST, LAST}
    for name, weight in coded.items():
        assert weight.shape == tuple(expert[name].shape)
        assert (weight.width_bits, weight.group) == (width_bits, group)
        assert (weight.zeros is not None) == spec.makes_zeros
        n_out, n_in = weight.shape
        codes = unpack(weight.planes, width_bits, n_outputs=n_out, n_inputs=n_in)
        assert 0 <= int(codes.min()) <= int(codes.max()) < 2**width_bits
        assert len(codes.unique()) > 1
        assert torch.isfinite(dequantize(weight)).all()


@EVERY
@WIDTHS
def test_the_same_expert_gets_the_same_bytes(spec, width_bits):
    expert = _expert()
    once, again = (
        spec.make(_inputs(expert))(expert, _precision(spec, width_bits)) for _ in range(2)
    )
    for name in expert:
        assert all(map(torch.equal, once[name].planes, again[name].planes))
        assert torch.equal(once[name].scales, again[name].scales)
    assert all(torch.equal(expert[name], _expert()[name]) for name in expert)  # not changed


@pytest.mark.parametrize(
    "spec", [s for s in QUANTIZERS.values() if s.objective], ids=lambda spec: spec.name
)
@WIDTHS
def test_what_it_makes_small_is_no_more_than_with_rounding_to_nearest(spec, width_bits):
    expert = _expert()
    inputs = _inputs(expert)
    found = _values(spec.make(inputs)(expert, _precision(spec, width_bits)))
    plain = QUANTIZERS["rtn"]
    nearest = _values(plain.make(None)(expert, _precision(plain, width_bits)))
    for name in expert:
        if name == LAST and spec.refit_last is not None:
            continue  # its target is another one
        moments = inputs.moments(name)
        made, least = (
            spec.objective(each[name] - expert[name], moments) for each in (found, nearest)
        )
        assert made <= least * (1 + 1e-3)


@EVERY
@WIDTHS
def test_a_matrix_of_zeros_stays_one(spec, width_bits):
    expert = {name: torch.zeros_like(value) for name, value in _expert().items()}
    found = _values(spec.make(_inputs(expert))(expert, _precision(spec, width_bits)))
    assert all(value.abs().max() < 1e-6 for value in found.values())


@EVERY
@WIDTHS
def test_a_group_of_zeros_and_a_huge_number_leave_everything_finite(spec, width_bits):
    expert = _expert()
    expert[FIRST][:, :32] = 0
    expert[FIRST][3, 64] = 6e4 * 2 ** (width_bits - 1)
    coded = spec.make(_inputs(expert))({FIRST: expert[FIRST]}, _precision(spec, width_bits, 32))
    found = dequantize(coded[FIRST])
    assert torch.isfinite(found).all()
    if not spec.needs_inputs:  # nothing is carried from one group to another
        assert not found[:, :32].any()
        errors = (found - expert[FIRST])[:, 32:64].abs()
        assert errors.max() < 4 * expert[FIRST][:, 32:64].abs().max()


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [FIRST, LAST])
def test_what_is_not_finite_is_refused(spec, bad, name):
    expert = _expert()
    expert[name][5, 7] = bad
    quantize = spec.make(_inputs(_expert()))
    with pytest.raises(CorruptArtifactError):
        quantize(expert, _precision(spec, 4))


@pytest.mark.parametrize(
    "spec", [s for s in QUANTIZERS.values() if s.needs_inputs], ids=lambda spec: spec.name
)
@WIDTHS
def test_an_expert_that_no_token_was_sent_to_is_rounded_to_nearest(spec, width_bits):
    if spec.name == "mc" and width_bits == 1:
        return  # one scale for the matrix: more error in weights, with tokens or without
    expert = _expert()
    found = _values(spec.make(_inputs(expert, n_tokens=0))(expert, _precision(spec, width_bits)))
    plain = QUANTIZERS["rtn"]
    nearest = _values(plain.make(None)(expert, _precision(plain, width_bits)))
    for name in expert:
        error = (found[name] - expert[name]).norm()
        assert error <= (1 + 1e-3) * (nearest[name] - expert[name]).norm()


@EVERY
@WIDTHS
def test_a_record_gives_back_what_it_was_made_of(spec, width_bits):
    expert = _expert()
    inputs = _inputs(expert)
    precision = _precision(spec, width_bits)
    tensors = tuple(ExpertTensor(name=n, shape=tuple(v.shape)) for n, v in expert.items())
    form = record_form(shape_of(tensors, "float32"), precision)
    read = form.decode(form.encode(coded_expert(expert, precision, spec.make(inputs))))
    made = spec.make(inputs)(expert, precision)
    for name in expert:
        assert torch.equal(dequantize(read[name]), dequantize(made[name]))


@EVERY
@pytest.mark.parametrize("width_bits", [3, 4])
def test_first_bits_are_an_expert_where_it_says_so(spec, width_bits):
    if not spec.can_nest:
        return
    expert = _expert()
    coded = spec.make(_inputs(expert))(expert, _precision(spec, width_bits, base_bits=2))
    for name, weight in coded.items():
        error = (dequantize(weight.base) - expert[name]).norm()
        assert error < 0.75 * expert[name].norm()


@EVERY
def test_a_spec_is_whole(spec):
    assert spec.summary and "\n" not in spec.summary
    assert parse_quantizer(spec.name) is spec
    assert spec.refit_last is None or spec.needs_inputs


def test_a_name_of_none_is_refused_with_those_there_are():
    with pytest.raises(UsageError) as refusal:
        parse_quantizer("awq")
    assert "gptq" in str(refusal.value.hint)
