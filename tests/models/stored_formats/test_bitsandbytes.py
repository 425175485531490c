"""bitsandbytes' weights are those of a decoder written anew, bit for bit, decoded or kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.errors import CorruptArtifactError, MoeToolError
from tests.models.stored_formats.coded_weights import Coded, Tensors, random_bytes
from tests.models.stored_formats.test_damaged import changed, cut, without
from tests.models.stored_formats.test_decoding import NAME, HeldBytes, named, opened

WEIGHT = f"{NAME}.weight"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))
OFFSET = 0.0377


def blob(state: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def four_bits(
    rng: np.random.Generator,
    n_out: int,
    n_in: int,
    *,
    kind: str = "nf4",
    block: int = 64,
    is_nested: bool = False,
) -> Coded:
    """Two codes in a byte, the first in its high half; scales may be coded themselves."""
    packed = random_bytes(rng, n_out * n_in // 2)
    table = np.array(NF4 if kind == "nf4" else FP4, dtype=np.float32)
    n_scales = -(-n_out * n_in // block)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [n_out, n_in]}
    scale = ((rng.random(n_scales) + 0.5) * 0.1).astype(np.float32)
    tensors = {"weight.absmax": torch.from_numpy(scale)}
    if is_nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": OFFSET}
        coded = random_bytes(rng, n_scales)
        values = np.linspace(-1, 1, 256, dtype=np.float32)
        outer = ((rng.random(-(-n_scales // 256)) + 0.5) * 0.01).astype(np.float32)
        scale = values[coded] * np.repeat(outer, 256)[:n_scales] + np.float32(OFFSET)
        tensors = {
            "weight.absmax": torch.from_numpy(coded),
            "weight.nested_absmax": torch.from_numpy(outer),
            "weight.nested_quant_map": torch.from_numpy(values),
        }
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
    weights = table[codes] * np.repeat(scale, block)[: n_out * n_in]
    tensors |= {
        "weight": torch.from_numpy(packed[:, None].copy()),
        "weight.quant_map": torch.from_numpy(table),
        f"weight.quant_state.bitsandbytes__{kind}": blob(state),
    }
    return Coded(tensors=tensors, weights=weights.reshape(n_out, n_in))


def int8(rng: np.random.Generator, n_out: int, n_in: int) -> Coded:
    codes = random_bytes(rng, n_out, n_in).view(np.int8)
    scale = (rng.random(n_out) + 0.5).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(codes),
        "SCB": torch.from_numpy(scale),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    weights = codes.astype(np.float32) * (scale / np.float32(127))[:, None]
    return Coded(tensors=tensors, weights=weights)


CASES: dict[str, Any] = {
    "nf4": lambda r: four_bits(r, 48, 192),
    "nf4 of nested scales": lambda r: four_bits(r, 320, 128, is_nested=True),
    "blocks of two rows": lambda r: four_bits(r, 49, 32),
    "blocks that go on in the next row": lambda r: four_bits(r, 50, 98),
    "fp4": lambda r: four_bits(r, 48, 192, kind="fp4", block=128),
    "fp4 of nested scales": lambda r: four_bits(r, 48, 192, kind="fp4", is_nested=True),
    "int8": lambda r: int8(r, 48, 192),
}
KEPT = {"nf4", "nf4 of nested scales", "blocks of two rows", "int8"}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_another_decoder(case: str, tmp_path: Path) -> None:
    coded = CASES[case](np.random.default_rng(7))
    with opened(tmp_path, named(coded), BNB) as checkpoint:
        assert list(checkpoint.tensors) == [WEIGHT]
        assert checkpoint.tensors[WEIGHT].shape == coded.weights.shape
        assert np.array_equal(checkpoint.read(WEIGHT).numpy(), coded.weights)
        stored = checkpoint.stored[WEIGHT]
        assert (stored.keep is not None) == (case in KEPT)
        if stored.keep is not None:
            parts = {
                role: coded.tensors[name.removeprefix(f"{NAME}.")]
                for role, name in stored.parts.items()
            }
            kept = stored.keep(parts)
            assert np.array_equal(kept.decode().numpy(), coded.weights)
            codes = kept.codes.view(-1)
            before = codes ^ 128 if case == "int8" else (codes >> 4) | (codes << 4)
            assert torch.equal(before, coded.tensors["weight"].view(torch.uint8).view(-1))


@pytest.mark.parametrize("case", ["nf4", "int8"])
def test_what_decoding_holds_is_announced(case: str, tmp_path: Path) -> None:
    make = four_bits if case == "nf4" else int8
    with opened(tmp_path, named(make(np.random.default_rng(7), 480, 960)), BNB) as checkpoint:
        with HeldBytes() as held:
            made = checkpoint.read(WEIGHT)
        announced = made.nbytes + checkpoint.extra_bytes(WEIGHT)
        assert 0.7 * announced < held.most < announced + 20_000, held.most / announced


def tensors(case: str = "nf4 of nested scales") -> Tensors:
    return named(CASES[case](np.random.default_rng(1)))


STATE = {"quant_type": "nf4", "blocksize": 64, "shape": [320, 128]}


def with_state(**changes: object) -> Tensors:
    return changed(tensors(), "__nf4", lambda _: blob(STATE | changes))


REFUSED: dict[str, tuple[Tensors, str]] = {
    "no state": (changed(tensors(), "__nf4", lambda t: t[:20]), "is not JSON"),
    "a list": (changed(tensors(), "__nf4", lambda _: blob([1])), "not the state of nf4"),
    "deep": (
        changed(tensors(), "__nf4", lambda _: torch.full((4000,), 91, dtype=torch.uint8)),
        "is not JSON",
    ),
    "long": (
        changed(tensors(), "__nf4", lambda _: torch.full((5000,), 32, dtype=torch.uint8)),
        "has 5000 bytes",
    ),
    "kind": (with_state(quant_type="fp4"), "not the state of nf4"),
    "vector": (with_state(shape=[320]), "no shape of a matrix"),
    "negative": (with_state(shape=[-320, -128]), "has a size that is none: -320"),
    "huge": (with_state(shape=[2**40, 128]), "has a size that is none"),
    "no block": (with_state(blocksize=None), "has a size that is none: None"),
    "empty block": (with_state(blocksize=0), "has a size that is none: 0"),
    "nested block": (with_state(nested_blocksize=True), "has a size that is none: True"),
    "offset": (with_state(nested_offset="x"), "no number as nested_offset"),
    "shape": (with_state(shape=[320, 130]), r"has 20480 bytes, 320 \* 130 codes"),
    "scales": (changed(tensors("nf4"), "absmax", cut), r"\[143\], its codes want \[144\]"),
    "outer": (changed(tensors(), ".nested_absmax", cut), r"\[2\], its codes want \[3\]"),
    "map": (changed(tensors(), ".quant_map", cut), r"\[15\], its codes want \[16\]"),
    "coded scales": (changed(tensors(), ".absmax", torch.Tensor.float), "stored as F32"),
    "no map": (without(tensors(), ".quant_map"), "lacks its part"),
    "no codes": (without(tensors("nf4"), ".weight"), "lacks its part"),
    "other codes": (changed(tensors(), ".weight", torch.Tensor.bfloat16), "stored as BF16"),
    "int8 scales": (changed(tensors("int8"), "SCB", cut), r"\[47\], its codes want \[48\]"),
    "int8 vector": (changed(tensors("int8"), ".weight", lambda t: t[0]), "is no matrix's"),
    "int8 codes": (changed(tensors("int8"), ".weight", torch.Tensor.int), "stored as I32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_unread(case: str, tmp_path: Path) -> None:
    damaged, words_of = REFUSED[case]
    with pytest.raises(MoeToolError, match=words_of) as caught:
        opened(tmp_path, damaged, BNB)
    assert caught.value.exit_code == 3 and caught.value.hint


def test_what_shows_only_when_read(tmp_path: Path) -> None:
    turned = changed(tensors("int8"), "weight_format", torch.ones_like)
    with (
        opened(tmp_path, turned, BNB) as checkpoint,
        pytest.raises(CorruptArtifactError, match="do not lie row by row"),
    ):
        checkpoint.read(WEIGHT)
    other = changed(tensors("nf4"), ".quant_map", lambda t: t * 2)
    with (
        opened(tmp_path, other, BNB) as checkpoint,
        pytest.raises(CorruptArtifactError, match="quant_map that is not NF4's"),
    ):
        checkpoint.read_kept(WEIGHT)
    endless = changed(
        tensors(),
        "__nf4",
        lambda _: blob(STATE | {"nested_blocksize": 256, "nested_offset": float("nan")}),
    )
    with (
        opened(tmp_path, endless, BNB) as checkpoint,
        pytest.raises(CorruptArtifactError, match="stands for NaN"),
    ):
        checkpoint.read(WEIGHT)
