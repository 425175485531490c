"""Kept codes: numbers computed by hand, and decoders written anew in numpy."""

import math

import numpy as np
import pytest
import torch

from moe_tool.quantization.kept_codes import KeptWeight, join_rows, kept_product
from tests.kept import FORMATS, draw_kept
from tests.models.stored_formats.test_decoding import HeldBytes


def bytes_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def test_mxfp4_by_hand() -> None:
    """Even inputs lie low, exponents count from 127, and 2**-127 is one of them."""
    weight = KeptWeight(
        codes=bytes_of([0x21, 0xF7], [0x98, 0x0D]), kind="e2m1",
        scale=bytes_of([128], [0]), group=(1, 4),
    )  # fmt: skip
    assert weight.shape == (2, 4)
    assert weight.decode().tolist() == [
        [1.0, 2.0, 12.0, -12.0],
        [-0.0, -0.5 * 2.0**-127, -3.0 * 2.0**-127, 0.0],
    ]
    assert math.copysign(1, weight.decode()[1, 0].item()) == -1


def test_nvfp4_by_hand() -> None:
    """1.75 times 0.1 is rounded before a code is multiplied; a divisor divides."""
    parts = {
        "codes": bytes_of([0x73]), "kind": "e2m1", "group": (1, 2),
        "scale": bytes_of([0x3E]).view(torch.float8_e4m3fn),  # 1.75
        "global_scale": torch.tensor([0.1]),
    }  # fmt: skip
    scale = np.float32(1.75) * np.float32(0.1)
    found = KeptWeight(**parts).decode()  # type: ignore[arg-type]
    assert found.numpy().tolist() == [[np.float32(1.5) * scale, np.float32(6) * scale]]
    scale = np.float32(1.75) / np.float32(0.1)
    found = KeptWeight(**parts, is_divisor=True).decode()  # type: ignore[arg-type]
    assert found.numpy().tolist() == [[np.float32(1.5) * scale, np.float32(6) * scale]]


def test_fp8_blocks_by_hand() -> None:
    """Blocks of 2 x 2 over 3 x 3: the last row and column have blocks of their own."""
    weight = KeptWeight(
        codes=bytes_of([0x38, 0xB8, 0x01], [0x7E, 0x00, 0x08], [0x40, 0x44, 0xFE]), kind="e4m3",
        scale=torch.tensor([[1.0, 2.0], [4.0, 8.0]]), group=(2, 2),
    )  # fmt: skip
    # 38 = 1, B8 = -1, 01 = 2**-9 (subnormal), 7E = 448, 08 = 2**-6, 40 = 2, 44 = 3, FE = -448
    assert weight.decode().tolist() == [
        [1.0, -1.0, 2.0**-8],
        [448.0, 0.0, 2.0**-5],
        [8.0, 12.0, -3584.0],
    ]


def test_integers_by_hand() -> None:
    plain = KeptWeight(
        codes=bytes_of([0xF0]), kind="int4", scale=torch.tensor([[0.5]]), group=(1, 2)
    )
    assert plain.decode().tolist() == [[-4.0, 3.5]]
    zeros = KeptWeight(
        codes=bytes_of([0xF0, 0x21]), kind="int4", scale=torch.tensor([[0.5, 2.0]]).half(),
        group=(1, 2), zero=bytes_of([3, 0]),
    )  # fmt: skip
    assert zeros.decode().tolist() == [[-1.5, 6.0, 2.0, 4.0]]
    biased = KeptWeight(
        codes=bytes_of([200, 1]), kind="int8", scale=torch.tensor([[0.25]]).bfloat16(),
        group=(1, 2), zero=torch.tensor([[-3.0]]),
    )  # fmt: skip
    assert biased.decode().tolist() == [[47.0, -2.75]]


def numpy_number(code: int, kind: str) -> float:
    if kind == "e2m1":
        exponent, fraction = code >> 1 & 3, code & 1
        size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2 ** (exponent - 1)
        return -size if code & 8 else size
    if kind == "e4m3":
        exponent, fraction = code >> 3 & 15, code & 7
        size = fraction * 2**-9 if exponent == 0 else (1 + fraction / 8) * 2 ** (exponent - 7)
        return -size if code & 128 else size
    assert kind in ("int4", "int8")
    return code


def numpy_decoded(weight: KeptWeight) -> np.ndarray:
    """Decode number by number, from what formats say."""
    n_out, n_in = weight.shape
    wide = weight.codes.numpy()
    if weight.kind in ("e2m1", "int4"):
        wide = np.stack([wide & 15, wide >> 4], -1).reshape(n_out, n_in)
    found = np.zeros((n_out, n_in), np.float32)
    for o in range(n_out):
        for i in range(n_in):
            at = (o // weight.group[0], i // weight.group[1])
            if weight.scale.dtype == torch.uint8:
                scale = np.float32(2.0 ** (int(weight.scale[at]) - 127))
            elif weight.scale.dtype == torch.float8_e4m3fn:
                code = int(weight.scale.view(torch.uint8)[at])
                scale = np.float32(numpy_number(code, "e4m3"))
            else:
                scale = np.float32(weight.scale[at].float().item())
            if weight.global_scale is not None:
                factor = np.float32(weight.global_scale[o].item())
                scale = scale / factor if weight.is_divisor else scale * factor
            number = np.float32(numpy_number(int(wide[o, i]), weight.kind))
            if weight.zero is not None and weight.zero.dtype == torch.float32:
                found[o, i] = number * scale + np.float32(weight.zero[at].item())
                continue
            middle = {"int4": 8, "int8": 128}.get(weight.kind, 0)
            zero = np.float32(middle if weight.zero is None else int(weight.zero[at]))
            found[o, i] = (number - zero) * scale
    return found


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nf4"])
def test_decoding_is_that_of_an_independent_decoder(name: str) -> None:
    for shape in ((3, 256), (37, 96)):
        weight = draw_kept(name, shape, seed=len(name))
        wanted = numpy_decoded(weight)
        found = weight.decode().numpy()
        assert np.array_equal(found.view(np.int32), wanted.view(np.int32))
        part = weight.decode(1, 3).numpy()
        assert np.array_equal(part, wanted[1:3])


def test_nf4_is_the_table() -> None:
    weight = KeptWeight(
        codes=torch.arange(0, 256, 1, dtype=torch.uint8)[None], kind="nf4",
        scale=torch.tensor([[2.0]]), group=(1, 512),
    )  # fmt: skip
    found = weight.decode()[0]
    # Quantiles: 8 of -1 ... 0 and 9 of 0 ... 1, ends and zero exactly.
    assert found[[0, 14, 30]].tolist() == [-2.0, 0.0, 2.0]
    assert torch.equal(found[:32:2], found[:32:2].sort().values)
    assert found[::32].tolist() == [-2.0] * 16 and found[1::32].unique().numel() == 16


@pytest.mark.parametrize("name", FORMATS)
def test_the_product_is_that_of_the_numbers(name: str) -> None:
    weight = draw_kept(name, (70, 256), seed=3)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ weight.decode().double().T
    error = (kept_product(x, weight) - wanted).norm() / wanted.norm()
    assert error < 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_joined_rows_are_those_of_the_parts(name: str) -> None:
    for heights in ((128, 40), (40, 64)):
        parts = [draw_kept(name, (n, 128), seed=n) for n in heights]
        joined = join_rows(parts)
        wanted = torch.cat([each.decode() for each in parts])
        assert torch.equal(joined.decode(), wanted)
        # Blocks stay blocks where the first part ends with one.
        rows = {each.group[0] for each in parts}
        assert joined.group[0] == (128 if rows == {128} and heights[0] == 128 else 1)


@pytest.mark.parametrize("zero", [None, torch.tensor([[3.0]])])
def test_a_group_far_longer_than_a_row_takes_no_memory(zero: torch.Tensor | None) -> None:
    weight = KeptWeight(
        codes=torch.full((4, 120), 130, dtype=torch.uint8), kind="int8",
        scale=torch.tensor([[0.5]]), group=(2**30, 2**30), zero=zero,
    )  # fmt: skip
    with HeldBytes() as held:
        found = weight.decode()
    # (130 - 128) * 0.5, or 130 * 0.5 + 3
    assert torch.equal(found, torch.full((4, 120), 1.0 if zero is None else 68.0))
    assert held.most < 8 * found.nbytes


def test_matrices_of_different_formats_are_not_joined() -> None:
    with pytest.raises(ValueError, match="different formats"):
        join_rows([draw_kept("mxfp4", (4, 64), seed=1), draw_kept("nvfp4", (4, 64), seed=1)])


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": torch.ones(3, 2)},
        {"scale": torch.ones(3, 4).double()},
        {"codes": torch.ones(3, 64)},
        {"zero": torch.ones(3, 3)},
        {"zero": torch.ones(3, 4, dtype=torch.int8)},
        {"kind": "e2m1", "zero": torch.ones(3, 4)},
        {"global_scale": torch.ones(2)},
        {"group": (1, 0)},
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, object]) -> None:
    sound = {
        "codes": torch.zeros(3, 64, dtype=torch.uint8),
        "kind": "int4",
        "scale": torch.ones(3, 4),
        "group": (1, 32),
    }
    KeptWeight(**sound)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        KeptWeight(**{**sound, **changed})  # type: ignore[arg-type]


OVERFLOWS: dict[str, tuple[dict[str, object], bool]] = {
    "6 * 2**127": ({"codes": bytes_of([0x70]), "scale": bytes_of([254])}, True),
    "1 * 2**127": ({"codes": bytes_of([0x22]), "scale": bytes_of([254])}, False),
    "2 * 2**127": ({"codes": bytes_of([0x42]), "scale": bytes_of([254])}, True),
    "6 * 2**125": ({"codes": bytes_of([0x77]), "scale": bytes_of([252])}, False),
    "a factor": ({"scale": torch.tensor([[3e38]]), "global_scale": torch.tensor([2.0])}, True),
    "a small factor": (
        {"scale": torch.tensor([[3e38]]), "global_scale": torch.tensor([0.01])}, False,
    ),
    "zero divides": (
        {
            "scale": torch.tensor([[1.0]]),
            "global_scale": torch.tensor([0.0]),
            "is_divisor": True,
        },
        True,
    ),
    "a tiny divisor": (
        {
            "scale": torch.tensor([[448.0]]),
            "global_scale": torch.tensor([1e-38]),
            "is_divisor": True,
        },
        True,
    ),
    "a bias": (
        {
            "kind": "int4",
            "codes": bytes_of([0xFF]),
            "scale": torch.tensor([[1e37]]),
            "zero": torch.tensor([[3e38]]),
        },
        True,
    ),
    "a bias that is taken back": (
        {
            "kind": "int4",
            "codes": bytes_of([0xFF]),
            "scale": torch.tensor([[1e37]]),
            "zero": torch.tensor([[-3e38]]),
        },
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERFLOWS)
def test_finite_parts_whose_product_is_infinite_are_broken(name: str) -> None:
    parts, is_broken = OVERFLOWS[name]
    weight = KeptWeight(**{"codes": bytes_of([0x77]), "kind": "e2m1", "group": (1, 2)} | parts)  # type: ignore[arg-type]
    assert torch.isfinite(weight.decode()).all() == (not is_broken)
    assert weight.broken_part() == ("scale" if is_broken else None)
