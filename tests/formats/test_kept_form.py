"""Records of kept codes: every format out and back, numbers that are none, precisions and names."""

import pytest
import torch
from pydantic import ValidationError

from moe_tool.artifacts.moe_shape import ExpertTensor
from moe_tool.artifacts.precision import KeptPrecision
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.kept_form import kept_precision, with_equal_groups
from moe_tool.formats.record_form import record_form
from moe_tool.quantization.kept_codes import KeptWeight
from moe_tool.quantization.weights import AnyWeight, FloatWeight
from tests.formats.shapes import shape_of
from tests.kept import FORMATS, draw_kept

TENSORS = (
    ExpertTensor(name="gate_up_proj", shape=(160, 256)),
    ExpertTensor(name="gate_up_proj_bias", shape=(160,)),
    ExpertTensor(name="down_proj", shape=(256, 80)),
)
NAMES = {
    "mxfp4": "mxfp4", "nvfp4": "nvfp4", "nvfp4 divided": "nvfp4", "fp8 blocks": "fp8",
    "fp8 rows": "fp8", "fp8 e8m0": "fp8", "fp8 tensor": "fp8", "int4 g32": "int4-g32",
    "int4 g128 zeros": "int4-g128-zeros", "int4 bias": "int4-g64-biases", "int8 rows": "int8",
    "int8 zeros": "int8-g64-zeros", "int8 bias": "int8-g32-biases", "nf4": "nf4-g64",
}  # fmt: skip


def expert(name: str) -> dict[str, AnyWeight]:
    return with_equal_groups(
        {
            "gate_up_proj": draw_kept(name, (160, 256), seed=1),
            "gate_up_proj_bias": FloatWeight(values=torch.randn(160)),
            "down_proj": draw_kept(name, (256, 80), seed=2),
        }
    )


@pytest.mark.parametrize("name", FORMATS)
def test_an_expert_comes_back_bit_for_bit(name: str) -> None:
    weights = expert(name)
    precision = kept_precision(weights)
    assert precision.name == NAMES[name]
    assert KeptPrecision.model_validate_json(precision.model_dump_json()) == precision
    form = record_form(shape_of(TENSORS, "float32"), precision)
    record = form.encode(weights)
    form.require_finite(record)
    found = form.decode(record)
    assert kept_precision(found) == precision
    for tensor in ("gate_up_proj", "down_proj"):
        kept, before = found[tensor], weights[tensor]
        assert isinstance(kept, KeptWeight) and isinstance(before, KeptWeight)
        assert torch.equal(kept.codes, before.codes)
        assert torch.equal(kept.decode(), before.decode())
    assert torch.equal(found["gate_up_proj_bias"].part(""), weights["gate_up_proj_bias"].part(""))


def test_an_mxfp4_record_byte_by_byte() -> None:
    tensors = (ExpertTensor(name="up_proj", shape=(2, 4)),)
    weight = KeptWeight(
        codes=torch.tensor([[0x21, 0xF7], [0x98, 0x0D]], dtype=torch.uint8),
        kind="e2m1",
        scale=torch.tensor([[127], [126]], dtype=torch.uint8),
        group=(1, 32),
    )
    precision = KeptPrecision(codes="e2m1", group_rows=1, group_columns=32, scale="e8m0")
    record = record_form(shape_of(tensors), precision).encode({"up_proj": weight})
    page = 4096
    wanted = bytes.fromhex("21f7980d").ljust(page, b"\0") + bytes.fromhex("7f7e").ljust(page, b"\0")
    assert record.numpy().tobytes() == wanted


@pytest.mark.parametrize(
    ("name", "segment", "damage"),
    [
        ("mxfp4", "down_proj.scale", b"\xff"),
        ("nvfp4", "down_proj.scale", b"\x7f"),
        ("nvfp4", "gate_up_proj.global_scale", b"\0\0\x80\x7f"),
        ("fp8 blocks", "down_proj.codes", b"\xff"),
        ("fp8 blocks", "gate_up_proj.scale", b"\0\0\xc0\xff"),
        ("fp8 rows", "gate_up_proj.scale", b"\x80\x7f"),
        ("fp8 e8m0", "gate_up_proj.scale", bytes([127 + 119])),
        ("int4 g128 zeros", "gate_up_proj.scale", b"\0\x7c"),
        ("int4 bias", "gate_up_proj.zero", b"\0\0\x80\xff"),
    ],
)
def test_numbers_that_are_none_are_refused(name: str, segment: str, damage: bytes) -> None:
    weights = expert(name)
    form = record_form(shape_of(TENSORS, "float32"), kept_precision(weights))
    record = form.encode(weights)
    (place,) = (each for each in form.layout.segments if each.name == segment)
    at = place.offset + place.n_bytes - len(damage)
    record[at : at + len(damage)] = torch.frombuffer(bytearray(damage), dtype=torch.uint8)
    with pytest.raises(CorruptArtifactError, match=segment):
        form.require_finite(record)


def test_an_odd_row_of_four_bits_is_refused() -> None:
    precision = KeptPrecision(codes="int4", group_rows=1, group_columns=32, scale="float16")
    with pytest.raises(CorruptArtifactError, match="7 codes"):
        record_form(shape_of((ExpertTensor(name="up_proj", shape=(2, 7)),)), precision)


def test_matrices_of_different_formats_have_no_precision() -> None:
    with pytest.raises(ValueError, match="different formats"):
        kept_precision({**expert("mxfp4"), "down_proj": draw_kept("nvfp4", (4, 64), seed=1)})


@pytest.mark.parametrize(
    "changed",
    [
        {"group_columns": 48},
        {"group_rows": 0},
        {"codes": "e5m2"},
        {"scale": "uint8"},
        {"codes": "e2m1", "zero": "codes"},
        {"global_scale": "half"},
        {"more": 1},
    ],
)
def test_unsound_precisions_are_refused(changed: dict[str, object]) -> None:
    sound = {"codes": "int4", "group_rows": 1, "group_columns": 32, "scale": "float16"}
    KeptPrecision.model_validate(sound)
    with pytest.raises(ValidationError):
        KeptPrecision.model_validate({**sound, **changed})
