"""MLX's weights are those of a decoder written anew, bit for bit, decoded or kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from moe_tool.errors import MoeToolError
from moe_tool.models.stored_formats.logical_checkpoint import LogicalCheckpoint
from moe_tool.models.stored_formats.registry import open_checkpoint
from tests.models.stored_formats.coded_weights import Coded, Tensors, bf16, e2m1, exponents
from tests.models.stored_formats.test_damaged import changed, cut, without
from tests.models.stored_formats.test_decoding import NAME, HeldBytes, named

WEIGHT = f"{NAME}.weight"
MLX = {"group_size": 32, "bits": 4}


def stream(codes: NDArray[np.uint8], bits: int) -> torch.Tensor:
    """Codes behind each other from the lowest bit on, in 32-bit words."""
    split = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(split.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view(np.uint32))


def mlx(
    rng: np.random.Generator, *shape: int, bits: int = 4, group: int = 32, is_float: bool = False
) -> Coded:
    codes = rng.integers(0, 2**bits, shape, dtype=np.uint8)
    grid = (*shape[:-1], shape[-1] // group)
    of_input = np.arange(shape[-1]) // group
    if is_float:
        stored, scale = exponents(rng, *grid)
        tensors = {"weight": stream(codes, bits), "scales": torch.from_numpy(stored)}
        return Coded(tensors=tensors, weights=e2m1(codes) * scale[..., of_input])
    stored, scale = bf16(rng, *grid, size=0.3 / 2**bits)
    middle = rng.normal(0, 0.02, grid) - scale * 2 ** (bits - 1)
    made = torch.from_numpy(middle.astype(np.float32)).bfloat16()
    tensors = {"weight": stream(codes, bits), "scales": stored, "biases": made}
    weights = codes.astype(np.float32) * scale[..., of_input] + made.float().numpy()[..., of_input]
    return Coded(tensors=tensors, weights=weights)


def opened(folder: Path, tensors: Tensors, settings: Any) -> LogicalCheckpoint:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    both = {"quantization": settings, "quantization_config": settings}
    checkpoint = open_checkpoint(folder, {"model_type": "qwen3_moe", **both})
    assert isinstance(checkpoint, LogicalCheckpoint)
    return checkpoint


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"{bits} bits": ({"bits": bits}, {"bits": bits}) for bits in (2, 3, 4, 6, 8)},
    "groups of 64": ({"group_size": 64}, {"group": 64}),
    "floats": ({"mode": "mxfp4"}, {"is_float": True}),
    "a module of its own": ({NAME: {"bits": 8, "group_size": 64}}, {"bits": 8, "group": 64}),
    "a module like the others": ({NAME: True, "lm_head": False}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_another_decoder(case: str, tmp_path: Path) -> None:
    settings, options = CASES[case]
    coded = mlx(np.random.default_rng(7), 48, 192, **options)
    with opened(tmp_path, named(coded), MLX | settings) as checkpoint:
        assert list(checkpoint.tensors) == [WEIGHT]
        assert checkpoint.tensors[WEIGHT].shape == (48, 192)
        assert np.array_equal(checkpoint.read(WEIGHT).numpy(), coded.weights)
        keep = checkpoint.stored[WEIGHT].keep
        assert (keep is None) == (options.get("bits") in (2, 3, 6))
        if keep is not None:
            roles = {"codes": "weight", "scale": "scales", "bias": "biases"}
            kept = keep({role: coded.tensors.get(name) for role, name in roles.items()})  # type: ignore[misc]
            assert np.array_equal(kept.decode().numpy(), coded.weights)
            assert torch.equal(kept.codes, coded.tensors["weight"].view(torch.uint8))
            assert torch.equal(kept.scale, coded.tensors["scales"])


@pytest.mark.parametrize(
    ("stack", "matrix"),
    [
        ("model.layers.0.mlp.switch_mlp.up_proj", "model.layers.0.mlp.experts.{}.up_proj"),
        (
            "model.layers.0.block_sparse_moe.switch_mlp.down_proj",
            "model.layers.0.block_sparse_moe.experts.{}.w2",
        ),
    ],
)
def test_stacked_experts_are_read_one_by_one(stack: str, matrix: str, tmp_path: Path) -> None:
    coded = mlx(np.random.default_rng(7), 3, 40, 96)
    floats = torch.randn(3, 8, 16).bfloat16()
    plain = stack.replace("layers.0", "layers.1")
    tensors = named(coded, stack) | {f"{plain}.weight": floats}
    with opened(tmp_path, tensors, MLX) as checkpoint:
        wanted = [f"{matrix.format(expert)}.weight" for expert in range(3)]
        others = [name.replace("layers.0", "layers.1") for name in wanted]
        assert sorted(checkpoint.tensors) == sorted(wanted + others)
        heard: list[tuple[str, int | None]] = []
        checkpoint.on_read = lambda name, row, _: heard.append((name, row))
        assert np.array_equal(checkpoint.read(wanted[2]).numpy(), coded.weights[2])
        assert set(heard) == {(name, 2) for name in named(coded, stack)}
        assert torch.equal(checkpoint.read(others[1]), floats[1].float())


@pytest.mark.parametrize("bits", [3, 4])
def test_what_decoding_holds_is_announced(bits: int, tmp_path: Path) -> None:
    coded = mlx(np.random.default_rng(7), 480, 960, bits=bits)
    with opened(tmp_path, named(coded), MLX | {"bits": bits}) as checkpoint:
        with HeldBytes() as held:
            made = checkpoint.read(WEIGHT)
        announced = made.nbytes + checkpoint.extra_bytes(WEIGHT)
        assert 0.7 * announced < held.most < announced + 20_000, held.most / announced


def tensors(module: str = NAME) -> Tensors:
    return named(mlx(np.random.default_rng(1), 48, 192), module)


STACK = "model.layers.0.mlp.switch_mlp.up_proj"
REFUSED: dict[str, tuple[dict[str, Any], Tensors, str]] = {
    "bits": ({"bits": 5}, tensors(), "mlx format with bits '5'"),
    "bits of floats": ({"mode": "mxfp4", "bits": 8}, tensors(), "bits '8'"),
    "no bits": ({"bits": None}, tensors(), "bits 'None'"),
    "mode": ({"mode": "nvfp4"}, tensors(), "mode 'nvfp4'"),
    "list": ({"mode": ["affine"]}, tensors(), "mode"),
    "group": ({"group_size": 0}, tensors(), "group_size '0'"),
    "one group": ({"group_size": -1}, tensors(), "group_size '-1'"),
    "odd group": ({"group_size": 40}, tensors(), "no groups of 40 codes of 4 bits"),
    "module's bits": ({NAME: {"bits": "8"}}, tensors(), "bits '8'"),
    "other bits": ({"bits": 3}, tensors(), "no groups of 32 codes of 3 bits|codes want"),
    "other scales": ({"mode": "mxfp4"}, tensors(), "stored as BF16, its format has U8"),
    "no codes": ({}, without(tensors(), ".weight"), "lacks its part"),
    "no biases": ({}, without(tensors(), ".biases"), "lacks its part .*biases"),
    "scales": ({}, changed(tensors(), "scales", cut), r"\[47, 6\], its codes want \[48, 6\]"),
    "biases": ({}, changed(tensors(), "biases", cut), r"\[47, 6\], its codes want \[48, 6\]"),
    "vector": ({}, changed(tensors(), ".weight", lambda t: t[0]), "no groups"),
    "empty": ({}, changed(tensors(), ".weight", lambda t: t[:0]), "no groups"),
    "signed": ({}, changed(tensors(), ".weight", lambda t: t.view(torch.int32)), "stored as I32"),
    "no stack": ({}, tensors(STACK), "is no stack of experts"),
    "stack of another model": (
        {},
        named(mlx(np.random.default_rng(1), 3, 48, 192), STACK.replace(".mlp", ".ffn")),
        "is no stack of experts",
    ),
    "stack of unknown place": (
        {},
        named(mlx(np.random.default_rng(1), 3, 48, 192)),
        r"has shape \[3, 48, 24\]: no groups",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_unread(case: str, tmp_path: Path) -> None:
    settings, damaged, words_of = REFUSED[case]
    with pytest.raises(MoeToolError, match=words_of) as caught:
        opened(tmp_path, damaged, MLX | settings)
    assert caught.value.exit_code == 3 and caught.value.hint
