"""Every format's weights are those of decoders written anew, bit for bit, decoded or kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_tool.models.stored_formats.logical_checkpoint import LogicalCheckpoint
from moe_tool.models.stored_formats.registry import open_checkpoint
from tests.models.stored_formats import coded_weights as make
from tests.models.stored_formats.coded_weights import Coded

NAME = "model.layers.0.mlp.experts.3.up_proj"
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def opened(folder: Path, tensors: dict[str, torch.Tensor], settings: Any) -> LogicalCheckpoint:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "mixtral", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder, config)
    assert isinstance(checkpoint, LogicalCheckpoint)
    return checkpoint


def named(coded: Coded, module: str = NAME) -> dict[str, torch.Tensor]:
    return {f"{module}.{ending}": tensor for ending, tensor in coded.tensors.items()}


CHANNEL = {"type": "float", "num_bits": 8, "strategy": "channel"}
FP4 = {"type": "float", "num_bits": 4}
CASES: dict[str, tuple[Any, Callable[[np.random.Generator], Coded]]] = {
    "blocks of 576 rows": (make.FP8_BLOCKS, lambda r: make.fp8(r, 576, 200)),
    "blocks of powers of two": (
        make.FP8_BLOCKS,
        lambda r: make.fp8(r, 130, 256, ending="scale", is_power=True),
    ),
    "one scale": (
        make.FP8_BLOCKS | {"weight_block_size": None},
        lambda r: make.fp8(r, 70, 50, block=(70, 50)),
    ),
    "channels": (
        make.FP8_BLOCKS | {"weight_block_size": None},
        lambda r: make.fp8(r, 70, 50, block=(1, 50)),
    ),
    "deepseek": (make.FP8_BLOCKS, lambda r: make.deepseek_fp4(r, 40, 96)),
    "int4": (make.INT4, lambda r: make.packed_integers(r, 40, 96)),
    "int4 of channels": (
        make.compressed("pack-quantized", strategy="channel"),
        lambda r: make.packed_integers(r, 40, 96, group=96),
    ),
    "int4 with zeros": (
        make.compressed("pack-quantized", group_size=32, symmetric=False),
        lambda r: make.packed_integers(r, 42, 96, is_symmetric=False),
    ),
    "int4 in order": (
        make.compressed("pack-quantized", group_size=32, actorder="group"),
        lambda r: make.packed_integers(r, 40, 96, is_ordered=True),
    ),
    "int4 in order with zeros": (
        make.compressed("pack-quantized", group_size=32, symmetric=False, actorder="group"),
        lambda r: make.packed_integers(r, 42, 96, is_symmetric=False, is_ordered=True),
    ),
    "int8 packed": (
        make.compressed("pack-quantized", num_bits=8, group_size=16),
        lambda r: make.packed_integers(r, 40, 96, group=16, width_bits=8),
    ),
    "int8 packed with zeros": (
        make.compressed("pack-quantized", num_bits=8, group_size=16, symmetric=False),
        lambda r: make.packed_integers(r, 41, 96, group=16, width_bits=8, is_symmetric=False),
    ),
    "int2": (
        make.compressed("pack-quantized", num_bits=2, group_size=32),
        lambda r: make.packed_integers(r, 40, 96, width_bits=2),
    ),
    "int8": (
        make.compressed("int-quantized", num_bits=8, strategy="channel"),
        lambda r: make.plain_integers(r, 40, 96, is_whole=False),
    ),
    "int8 with a zero": (
        make.compressed("int-quantized", num_bits=8, strategy="tensor", symmetric=False),
        lambda r: make.plain_integers(r, 40, 96, is_whole=True),
    ),
    "fp8 of channels": (
        make.compressed("float-quantized", **CHANNEL),
        lambda r: make.channel_fp8(r, 40, 96),
    ),
    "fp8 of blocks": (
        make.compressed(
            "float-quantized", **{**CHANNEL, "strategy": "block", "block_structure": [128, 128]}
        ),
        lambda r: make.fp8(r, 130, 150, ending="weight_scale"),
    ),
    "nvfp4": (
        make.compressed("nvfp4-pack-quantized", **FP4, group_size=16, strategy="tensor_group"),
        lambda r: make.packed_nvfp4(r, 40, 96),
    ),
    "mxfp4": (
        make.compressed("mxfp4-pack-quantized", **FP4, group_size=32),
        lambda r: make.packed_mxfp4(r, 40, 96),
    ),
    "modelopt": (make.MODELOPT, lambda r: make.modelopt_nvfp4(r, 40, 96)),
    "modelopt fp8": (
        make.MODELOPT | {"quant_algo": "FP8"},
        lambda r: make.fp8(r, 70, 50, block=(70, 50), ending="weight_scale"),
    ),
}
NOT_KEPT = {"int4 in order", "int4 in order with zeros", "int2"}


class HeldBytes(TorchDispatchMode):
    """Peak of the bytes of tensors that are made inside and not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        given = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        made = function(*args, **(kwargs or {}))
        self._alive = {k: held for k, held in self._alive.items() if not held[0].expired()}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return made


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_another_decoder(case: str, tmp_path: Path) -> None:
    settings, encode = CASES[case]
    coded = encode(np.random.default_rng(7))
    with opened(tmp_path, named(coded), settings) as checkpoint:
        assert list(checkpoint.tensors) == [f"{NAME}.weight"]
        info = checkpoint.tensors[f"{NAME}.weight"]
        assert info.dtype == "F32" and info.shape == coded.weights.shape
        assert info.size_bytes == coded.weights.nbytes
        found = checkpoint.read(f"{NAME}.weight")
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), coded.weights)
        assert np.std(coded.weights) > 1e-3
        assert checkpoint.read_bytes(f"{NAME}.weight") == coded.weights.tobytes()
        stored = checkpoint.stored[f"{NAME}.weight"]
        assert (stored.keep is None) == (case in NOT_KEPT)
        if stored.keep is not None:
            parts = {
                role: coded.tensors[name.removeprefix(f"{NAME}.")]
                for role, name in stored.parts.items()
            }
            assert torch.equal(stored.keep(parts).decode(), found)


BIG: dict[str, tuple[Any, Callable[[np.random.Generator], Coded]]] = {
    "fp8": (make.FP8_BLOCKS, lambda r: make.fp8(r, 576, 1000)),
    "fp8 of channels": (CASES["fp8 of channels"][0], lambda r: make.channel_fp8(r, 500, 1000)),
    "deepseek": (make.FP8_BLOCKS, lambda r: make.deepseek_fp4(r, 500, 960)),
    "nvfp4": (CASES["nvfp4"][0], lambda r: make.packed_nvfp4(r, 500, 960)),
    "int4": (make.INT4, lambda r: make.packed_integers(r, 500, 960)),
    "zeros": (
        CASES["int4 with zeros"][0],
        lambda r: make.packed_integers(r, 500, 960, is_symmetric=False),
    ),
    "order": (
        CASES["int4 in order"][0],
        lambda r: make.packed_integers(r, 500, 960, is_ordered=True),
    ),
    "int8": (CASES["int8"][0], lambda r: make.plain_integers(r, 500, 960, is_whole=False)),
}


@pytest.mark.parametrize("case", BIG)
def test_what_decoding_holds_is_announced(case: str, tmp_path: Path) -> None:
    settings, encode = BIG[case]
    with opened(tmp_path, named(encode(np.random.default_rng(7))), settings) as checkpoint:
        name = f"{NAME}.weight"
        with HeldBytes() as held:
            made = checkpoint.read(name)
        announced = made.nbytes + checkpoint.extra_bytes(name)
        assert 0.7 * announced < held.most < announced + 20_000, held.most / announced


STACKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "one scale an expert": (None, (4,)),
    "one scale an expert, as a matrix": (None, (4, 1, 1)),
    "channels": (None, (4, 130, 1)),
    "blocks": ([128, 128], (4, 2, 3)),
    "gate and up": (None, (4, 2, 1)),
    "gate and up in blocks": ([256, 128], (4, 2, 3)),
}


@pytest.mark.parametrize("case", STACKS)
def test_stacked_fp8_is_read_expert_by_expert(case: str, tmp_path: Path) -> None:
    block, shape = STACKS[case]
    rng = np.random.default_rng(3)
    codes = make.fp8_bytes(rng, 4, 130, 300)
    scale = (rng.random(shape) + 0.5).astype(np.float32) * np.float32(1e-4)
    group = {
        "blocks": (128, 128),
        "channels": (1, 300),
        "gate and up": (65, 300),
        "gate and up in blocks": (65, 128),
    }.get(case, (130, 300))
    grid = (-(-130 // group[0]), -(-300 // group[1]))
    wanted = np.stack(
        [
            make.e4m3(codes[k]) * make.spread(scale[k].reshape(grid), group, (130, 300))
            for k in range(4)
        ]
    )
    tensors = {STACK: make.as_fp8(codes), f"{STACK}_scale_inv": torch.from_numpy(scale)}
    settings = make.FP8_BLOCKS | {"weight_block_size": block}
    with opened(tmp_path, tensors, settings) as checkpoint:
        _check_rows(checkpoint, wanted)


def test_gpt_oss_is_read_as_transformers_has_its_parameter(tmp_path: Path) -> None:
    coded = make.stacked_mxfp4(np.random.default_rng(3), 4, 24, 96)
    tensors = {f"{STACK}{ending}": tensor for ending, tensor in coded.tensors.items()}
    theirs = convert_moe_packed_tensors(
        coded.tensors["_blocks"], coded.tensors["_scales"], dtype=torch.float32
    )
    assert np.array_equal(theirs.numpy(), coded.weights)
    with opened(tmp_path, tensors, make.MXFP4) as checkpoint:
        _check_rows(checkpoint, coded.weights)
        stored = checkpoint.stored[STACK]
        assert stored.keep is not None
        row = {"codes": coded.tensors["_blocks"][2], "scale": coded.tensors["_scales"][2]}
        assert np.array_equal(stored.keep(row).decode().numpy().T, coded.weights[2])


def _check_rows(checkpoint: LogicalCheckpoint, wanted: make.Floats) -> None:
    heard: list[tuple[str, int | None, int]] = []
    checkpoint.on_read = lambda name, row, view: heard.append((name, row, len(view)))
    assert checkpoint.tensors[STACK].shape == wanted.shape
    row = checkpoint.read(STACK, row=2)
    assert np.array_equal(row.numpy(), wanted[2])
    assert {(name, at) for name, at, _ in heard} == {
        (part, 2) for part in checkpoint.stored[STACK].parts.values()
    }
    assert checkpoint.bytes_read == sum(size for _, _, size in heard)
    assert checkpoint.bytes_read * len(wanted) == checkpoint.total_bytes
    assert np.array_equal(checkpoint.read(STACK).numpy(), wanted)


@pytest.mark.parametrize(
    ("form", "case"),
    [
        ("pack-quantized", "int4 with zeros"),
        ("float-quantized", "fp8 of channels"),
        ("int-quantized", "int8 with a zero"),
    ],
)
def test_compressed_tensors_itself_says_the_same(form: str, case: str) -> None:
    settings, encode = CASES[case]
    coded = encode(np.random.default_rng(7))
    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    parts = {
        name: tensor.float() if name == "weight_scale" else tensor
        for name, tensor in coded.tensors.items()
    }
    made = BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)["weight"]
    assert np.array_equal(made.float().numpy(), coded.weights)


def test_each_group_has_its_settings(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    settings = make.INT4 | {"format": "mixed-precision"}
    groups = {
        "others": ("pack-quantized", ["Linear"], {"num_bits": 4, "group_size": 32}),
        "eights": (
            "pack-quantized",
            ["re:.*down_proj$"],
            {"num_bits": 8, "group_size": 16, "symmetric": False},
        ),
        "floats": ("float-quantized", ["model.layers.1.down_proj"], CHANNEL),
    }
    settings["config_groups"] = {
        key: {"format": form, "targets": targets, "weights": {"strategy": "group"} | weights}
        for key, (form, targets, weights) in groups.items()
    }
    coded = {
        "model.layers.0.up_proj": make.packed_integers(rng, 24, 64),
        "model.layers.0.down_proj": make.packed_integers(
            rng, 24, 64, group=16, width_bits=8, is_symmetric=False
        ),
        "model.layers.1.down_proj": make.channel_fp8(rng, 24, 64),
    }
    tensors = {"lm_head.weight": torch.ones(4, 4)}
    for module, each in coded.items():
        tensors |= named(each, module)
    with opened(tmp_path, tensors, settings) as checkpoint:
        assert checkpoint.tensors.keys() == {"lm_head.weight", *(f"{m}.weight" for m in coded)}
        for module, each in coded.items():
            assert np.array_equal(checkpoint.read(f"{module}.weight").numpy(), each.weights)


def test_scales_of_activations_and_of_the_cache_are_no_weights(tmp_path: Path) -> None:
    tensors = named(make.fp8(np.random.default_rng(1), 40, 50))
    one = torch.ones(1)
    extra = [f"{NAME}.input_scale", "model.layers.0.self_attn.k_scale", f"{NAME}.activation_scale"]
    with opened(
        tmp_path, tensors | {name: one.clone() for name in extra}, make.FP8_BLOCKS
    ) as checkpoint:
        assert list(checkpoint.tensors) == [f"{NAME}.weight"]
