"""One tiny model for every quantized layout that is read, small enough to pack in a moment."""

from functools import partial

import numpy as np
import torch
from transformers import PreTrainedConfig

from tests.models.stored_formats import coded_weights as make
from tests.models.stored_formats.coded_weights import Coded
from tests.models.stored_formats.test_awq import AWQ, awq
from tests.models.stored_formats.test_bitsandbytes import BNB, four_bits, int8
from tests.models.stored_formats.test_coded_models import MODELS, Model, qwen3_moe
from tests.models.stored_formats.test_decoding import CASES
from tests.models.stored_formats.test_gptq import GPTQ, gptq
from tests.models.stored_formats.test_mlx import MLX, mlx

SCALAR = make.FP8_BLOCKS | {"weight_block_size": None}


def small() -> PreTrainedConfig:
    """One layer of four experts."""
    config = qwen3_moe()
    config.num_hidden_layers, config.num_experts = 1, 4
    return config


def scalar_fp8(rng: np.random.Generator, n_out: int, n_in: int) -> Coded:
    made = make.fp8(rng, n_out, n_in, block=(n_out, n_in))
    return Coded(
        tensors={name: t.view(()) if t.numel() == 1 else t for name, t in made.tensors.items()},
        weights=made.weights,
    )


def modelopt_fp8(rng: np.random.Generator, n_out: int, n_in: int) -> Coded:
    made = make.fp8(rng, n_out, n_in, block=(n_out, n_in), ending="weight_scale")
    return Coded(tensors=made.tensors | {"input_scale": torch.tensor(0.01)}, weights=made.weights)


LAYOUTS: dict[str, Model] = {
    "fp8 blocks": (
        small,
        make.FP8_BLOCKS | {"weight_block_size": [32, 32]},
        partial(make.fp8, block=(32, 32)),
    ),
    "fp8 scalar": (small, SCALAR, scalar_fp8),
    "fp8 powers": (
        small,
        make.FP8_BLOCKS,
        partial(make.fp8, ending="scale", is_power=True),
    ),
    "deepseek fp4": (small, make.FP8_BLOCKS, make.deepseek_fp4),
    "mxfp4": MODELS["mxfp4"],
    "ct int4": (small, make.INT4, make.packed_integers),
    "ct int4 zeros": (
        small,
        CASES["int4 with zeros"][0],
        partial(make.packed_integers, is_symmetric=False),
    ),
    "ct int8": (small, CASES["int8"][0], partial(make.plain_integers, is_whole=False)),
    "ct fp8": (small, CASES["fp8 of channels"][0], make.channel_fp8),
    "ct nvfp4": (small, CASES["nvfp4"][0], make.packed_nvfp4),
    "ct mxfp4": (small, CASES["mxfp4"][0], make.packed_mxfp4),
    "modelopt fp8": (small, make.MODELOPT | {"quant_algo": "FP8"}, modelopt_fp8),
    "modelopt nvfp4": (small, make.MODELOPT, make.modelopt_nvfp4),
    "gptq": (small, GPTQ, gptq),
    "gptq ordered": (small, GPTQ | {"desc_act": True}, partial(gptq, is_ordered=True)),
    "awq": (small, AWQ, awq),
    "nf4": (small, BNB, partial(four_bits, is_nested=True)),
    "bnb int8": (small, BNB | {"load_in_4bit": False, "load_in_8bit": True}, int8),
    "mlx": (small, MLX, mlx),
}
"""Model by the name of its layout"""
FIRST = {
    "fp8 blocks", "deepseek fp4", "mxfp4", "ct int4 zeros", "ct nvfp4", "modelopt fp8", "gptq",
    "awq", "nf4", "bnb int8", "mlx",
}  # fmt: skip
"""One layout for each format and way to store codes"""
