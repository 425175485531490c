"""Records: a tiny one byte by byte, and any weights out and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.moe_shape import ExpertTensor
from moe_tool.artifacts.precision import NativePrecision, precision_from_bits
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.record_form import record_form
from moe_tool.packing.expert_coding import coded
from moe_tool.quantization.round_to_nearest import dequantize, round_trip
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from tests.formats.shapes import shape_of

TENSORS = (
    ExpertTensor(name="up_proj", shape=(2, 3)),
    ExpertTensor(name="up_proj_bias", shape=(2,)),
)
WEIGHTS = {
    "up_proj": torch.tensor([[-8.0, 1.0, 7.0], [16.0, -4.0, 0.0]], dtype=torch.bfloat16),
    "up_proj_bias": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
}
PAGE = 4096


def padded(text: str) -> bytes:
    return bytes.fromhex(text).ljust(PAGE, b"\0")


def test_a_native_record_byte_by_byte() -> None:
    form = record_form(shape_of(TENSORS), NativePrecision())
    record = form.encode(coded(WEIGHTS, NativePrecision()))
    # bfloat16 is the upper half of float32: -8 = C100, 1 = 3F80, 7 = 40E0, 16 = 4180, -4 = C080.
    matrix = padded("00c1 803f e040 8041 80c0 0000")
    assert record.numpy().tobytes() == matrix + padded("803f 00c0")


def placed(n_bytes: int, found: dict[int, int]) -> bytes:
    data = bytearray(n_bytes)
    for at, value in found.items():
        data[at] = value
    return bytes(data).ljust(PAGE, b"\0")


def test_a_four_bit_record_byte_by_byte() -> None:
    precision = precision_from_bits("4")
    form = record_form(shape_of(TENSORS), precision)
    record = form.encode(coded(WEIGHTS, precision))
    # Row 0: d = -8 / -8 = 1, codes -8 1 7, stored 0 9 15. Row 1: d = 16 / -8 = -2, codes -8 2 0,
    # stored 0 10 8. Rows 0 and 1 start at bytes 0 and 4 of a tile; 9 is 10 01, 10 is 10 10.
    high = placed(128, {1: 0b10, 2: 0b11, 5: 0b10, 6: 0b10})
    low = placed(128, {1: 0b01, 2: 0b11, 5: 0b10, 6: 0b00})
    scales = padded("003c 00c0")  # float16: 1 = 3C00, -2 = C000
    assert record.numpy().tobytes() == high + low + scales + padded("803f 00c0")


def test_an_eight_bit_record_byte_by_byte() -> None:
    precision = precision_from_bits("8")
    form = record_form(shape_of(TENSORS), precision)
    record = form.encode(coded(WEIGHTS, precision))
    # Row 0: d = -8 / -128 = 1/16, codes -128 16 112, stored 0 144 240.
    # Row 1: d = -1/8, codes -128 32 0, stored 0 160 128.
    codes = placed(512, {1: 144, 2: 240, 5: 160, 6: 128})
    scales = padded("002c 00b0")  # float16: 1/16 = 2C00, -1/8 = B000
    assert record.numpy().tobytes() == codes + scales + padded("803f 00c0")


def test_the_segments_of_a_layout_are_named_aligned_and_contiguous() -> None:
    tensors = (ExpertTensor(name="up_proj", shape=(100, 130)), TENSORS[1])
    layout = record_form(shape_of(tensors, "float16"), precision_from_bits("4")).layout
    found = [(s.name, s.offset, s.n_bytes, s.size_bytes, s.shape) for s in layout.segments]
    assert found == [
        # 7 x 5 tiles of 128 bytes, twice
        ("up_proj.plane0", 0, 4480, 8192, (4480,)),
        ("up_proj.plane1", 8192, 4480, 8192, (4480,)),
        ("up_proj.scales", 16384, 672, 4096, (7, 3, 16)),
        ("up_proj_bias", 20480, 4, 4096, (2,)),
    ]
    assert layout.size_bytes == 24576


def test_decoded_weights_are_views_of_the_record() -> None:
    precision = precision_from_bits("8")
    form = record_form(shape_of(TENSORS), precision)
    record = form.encode(coded(WEIGHTS, precision))
    weights = form.decode(record)
    matrix, bias = weights["up_proj"], weights["up_proj_bias"]
    assert isinstance(matrix, IntegerWeight) and isinstance(bias, FloatWeight)
    storage = record.untyped_storage().data_ptr()
    for view in (*matrix.planes, matrix.scales, bias.values):
        assert view.untyped_storage().data_ptr() == storage


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("bad", ["007e", "007c", "00fc"])  # NaN, inf, -inf
def test_a_record_with_scales_that_are_no_numbers_is_refused(bits: str, bad: str) -> None:
    precision = precision_from_bits(bits)
    form = record_form(shape_of(TENSORS), precision)
    record = form.encode(coded(WEIGHTS, precision))
    form.require_finite(record)
    start = next(s.offset for s in form.layout.segments if s.name == "up_proj.scales")
    record[start + 2 : start + 4] = torch.tensor(list(bytes.fromhex(bad)), dtype=torch.uint8)
    with pytest.raises(CorruptArtifactError, match=r"up_proj\.scales") as error:
        form.require_finite(record)
    assert error.value.hint


def test_padding_is_no_part_of_the_scales() -> None:
    precision = precision_from_bits("4")
    form = record_form(shape_of(TENSORS), precision)
    record = form.encode(coded(WEIGHTS, precision))
    scales = next(s for s in form.layout.segments if s.name == "up_proj.scales")
    record[scales.offset + scales.n_bytes : scales.offset + scales.size_bytes] = 0xFF
    form.require_finite(record)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_weights_that_are_no_numbers_are_not_quantized(bits: str) -> None:
    precision = precision_from_bits(bits)
    weights = WEIGHTS | {"up_proj": torch.full((2, 3), torch.nan, dtype=torch.bfloat16)}
    with pytest.raises(CorruptArtifactError, match="NaN"):
        coded(weights, precision)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_expert_comes_back(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    precision = precision_from_bits(data.draw(st.sampled_from(["native", "8", "4"])))
    extents = st.integers(1, 150)
    shapes = data.draw(
        st.lists(st.one_of(st.tuples(extents, extents), st.tuples(extents)), min_size=1, max_size=4)
    )
    tensors = [ExpertTensor(name=f"t{i}", shape=shape) for i, shape in enumerate(shapes)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weights = {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(getattr(torch, dtype))
        for tensor in tensors
    }
    form = record_form(shape_of(tensors, dtype), precision)
    record = form.encode(coded(weights, precision))
    size = form.layout.size_bytes
    assert record.shape == (size,) and size % PAGE == 0
    for name, found in form.decode(record).items():
        if isinstance(found, IntegerWeight):
            bits = found.width_bits
            assert torch.equal(dequantize(found), round_trip(weights[name], bits))
        else:
            assert found.values.dtype == weights[name].dtype
            assert torch.equal(found.values, weights[name])
