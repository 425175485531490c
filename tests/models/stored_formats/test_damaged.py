"""Damaged and foreign quantized checkpoints are refused with one sentence that names the tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.errors import CorruptArtifactError, MoeToolError, UnsupportedModelError
from moe_tool.models.stored_formats.registry import open_checkpoint
from tests.models.stored_formats import coded_weights as make
from tests.models.stored_formats.test_decoding import CASES, NAME, STACK, named, opened

Tensors = dict[str, torch.Tensor]
WEIGHT = f"{NAME}.weight"
SCALE = f"{NAME}.weight_scale_inv"
POWER = torch.float8_e8m0fnu


def fp8() -> Tensors:
    return named(make.fp8(np.random.default_rng(1), 130, 256))


def case(name: str) -> Tensors:
    return named(CASES[name][1](np.random.default_rng(1)))


def stacked() -> Tensors:
    coded = make.stacked_mxfp4(np.random.default_rng(3), 4, 24, 96)
    return {f"{STACK}{ending}": tensor for ending, tensor in coded.tensors.items()}


def without(tensors: Tensors, ending: str) -> Tensors:
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
    assert len(kept) < len(tensors)
    return kept


def changed(tensors: Tensors, ending: str, change: Callable[[torch.Tensor], Any]) -> Tensors:
    name = next(name for name in tensors if name.endswith(ending))
    return tensors | {name: change(tensors[name]).contiguous()}


def cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1]


INT4 = "int4 with zeros"
HEADERS: dict[str, tuple[Any, Callable[[], Tensors], str]] = {
    "no scale": (make.FP8_BLOCKS, lambda: without(fp8(), SCALE), "without a scale"),
    "a scale too few": (
        make.FP8_BLOCKS,
        lambda: changed(fp8(), SCALE, cut),
        r"\[1, 2\], a matrix \[130, 256\] wants 1 or \[130, 1\] or \[2, 2\] for blocks",
    ),
    "integer scales": (
        make.FP8_BLOCKS,
        lambda: changed(fp8(), SCALE, torch.Tensor.int),
        "is stored as I32, its format has F32",
    ),
    "a vector": (
        make.FP8_BLOCKS,
        lambda: changed(fp8(), ".weight", lambda t: t[0]),
        "is no matrix's",
    ),
    "an empty matrix": (
        make.FP8_BLOCKS,
        lambda: changed(fp8(), ".weight", lambda t: t[:0]),
        "is no matrix's",
    ),
    "blocks of nothing": (
        make.FP8_BLOCKS | {"weight_block_size": [0, 128]},
        fp8,
        r"fp8 format with weight_block_size '\[0, 128\]'",
    ),
    "blocks in words": (make.FP8_BLOCKS | {"weight_block_size": "big"}, fp8, "weight_block_size"),
    "deepseek's odd group": (
        make.FP8_BLOCKS,
        lambda: changed(case("deepseek"), ".weight", lambda t: t[:, :-1]),
        "no groups of 32",
    ),
    "no exponents": (make.MXFP4, lambda: without(stacked(), "_scales"), "lacks its part"),
    "half blocks": (
        make.MXFP4,
        lambda: changed(stacked(), "_blocks", lambda t: t[..., :8]),
        "and 16 bytes",
    ),
    "an expert's exponents too few": (
        make.MXFP4,
        lambda: changed(stacked(), "_scales", cut),
        r"has shape \[3, 24, 3\], its codes want \[4, 24, 3\]",
    ),
    "no zeros": (CASES[INT4][0], lambda: without(case(INT4), "zero_point"), "weight_zero_point"),
    "zeros too few": (
        CASES[INT4][0],
        lambda: changed(case(INT4), "zero_point", cut),
        r"has shape \[5, 3\], its codes want \[6, 3\]",
    ),
    "codes without a scale": (make.INT4, lambda: without(case("int4"), "weight_scale"), "lacks"),
    "no codes": (make.INT4, lambda: without(case("int4"), "_packed"), "weight_packed"),
    "words of bytes": (
        make.INT4,
        lambda: changed(case("int4"), "_packed", torch.Tensor.byte),
        "is stored as U8, its format has I32",
    ),
    "a group that does not divide": (
        make.compressed("pack-quantized", group_size=36),
        lambda: changed(case("int4"), "weight_scale", lambda t: t),
        "has 96 inputs, which groups of 36 do not divide",
    ),
    "the order of other inputs": (
        CASES["int4 in order"][0],
        lambda: changed(case("int4 in order"), "g_idx", cut),
        r"has shape \[95\]",
    ),
    "no scale of the whole": (
        CASES["nvfp4"][0],
        lambda: without(case("nvfp4"), "weight_global_scale"),
        "weight_global_scale",
    ),
    "two scales of the whole": (
        make.MODELOPT,
        lambda: changed(case("modelopt"), "scale_2", lambda t: torch.ones(2)),
        r"has shape \[2\]",
    ),
    "a module of no group": (
        make.compressed("pack-quantized", ("re:.*q_proj$",), group_size=32),
        lambda: case("int4"),
        "belongs to no group",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_do_not_fit_are_refused_unread(name: str, tmp_path: Path) -> None:
    settings, tensors, words = HEADERS[name]
    with pytest.raises(MoeToolError, match=words) as caught:
        opened(tmp_path, tensors(), settings)
    assert caught.value.exit_code == 3 and caught.value.hint
    assert "\n" not in caught.value.message


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.view(torch.uint8).clone()
    raw.view(-1)[-1] = 255
    return raw.view(tensor.dtype)


VALUES: dict[str, tuple[Any, Callable[[], Tensors], str]] = {
    "a code": (make.FP8_BLOCKS, lambda: changed(fp8(), ".weight", with_nan), "NaN"),
    "a scale": (
        make.FP8_BLOCKS,
        lambda: changed(fp8(), SCALE, lambda t: t * torch.nan),
        "NaN or infinity",
    ),
    "a power of two": (
        make.FP8_BLOCKS,
        lambda: changed(case("blocks of powers of two"), ".scale", with_nan),
        "stands for NaN",
    ),
    "an exponent": (
        CASES["mxfp4"][0],
        lambda: changed(case("mxfp4"), "weight_scale", with_nan),
        "stands for NaN",
    ),
    "a divisor": (
        CASES["nvfp4"][0],
        lambda: changed(case("nvfp4"), "weight_global_scale", torch.zeros_like),
        "stands for NaN",
    ),
    "an overflow": (
        make.FP8_BLOCKS,
        lambda: changed(fp8(), SCALE, lambda t: t * 0 + 3e38),
        "stands for NaN or infinity",
    ),
    "an order": (
        CASES["int4 in order"][0],
        lambda: changed(case("int4 in order"), "g_idx", lambda t: t + 1),
        "groups beyond its 3",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_numbers_that_are_none_are_refused_when_read(name: str, tmp_path: Path) -> None:
    settings, tensors, words = VALUES[name]
    with opened(tmp_path, tensors(), settings) as checkpoint:
        with pytest.raises(CorruptArtifactError, match=words) as caught:
            checkpoint.read(WEIGHT)
        assert NAME in caught.value.message


def test_an_expert_that_is_none_is_named_by_its_row(tmp_path: Path) -> None:
    with opened(tmp_path, changed(stacked(), "_scales", with_nan), make.MXFP4) as checkpoint:
        checkpoint.read(STACK, row=2)
        with pytest.raises(CorruptArtifactError, match=r"\(row 3\) stands for NaN"):
            checkpoint.read(STACK, row=3)


@pytest.mark.parametrize("n_bytes", [1, 5000])
def test_a_truncated_file_is_refused(n_bytes: int, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, fp8(), make.FP8_BLOCKS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-n_bytes])
    with pytest.raises(CorruptArtifactError, match="ended while"), checkpoint:
        checkpoint.read(WEIGHT)
    with pytest.raises(CorruptArtifactError, match="truncated"):
        open_checkpoint(tmp_path, json.loads((tmp_path / "config.json").read_text()))


FP4 = {"type": "float", "num_bits": 4}
UNREAD: dict[str, tuple[Any, str]] = {
    "another method": ({"quant_method": "aqlm"}, "stored in aqlm format, which is not read"),
    "a method of no letters": ({"quant_method": "\x1b[2J\x00"}, r"stored in \?\[2j\? format"),
    "no method": ({"bits": 4}, "stored in unknown format"),
    "no object": ("fp8", "stored in unknown format"),
    "another width": (make.compressed("pack-quantized", num_bits=3), "num_bits '3 of pack"),
    "a width in words": (make.compressed("pack-quantized", num_bits="4"), "num_bits '4 of pack"),
    "floats in words": (make.compressed("pack-quantized", **FP4), "num_bits '4 of pack"),
    "a fractional width": (
        make.compressed("pack-quantized", num_bits=4.0),
        "num_bits '4.0 of pack",
    ),
    "a list of formats": (make.INT4 | {"format": ["pack-quantized"]}, "format"),
    "sparse": (make.compressed("sparse-24-bitmask"), "format 'sparse-24-bitmask of ints'"),
    "another strategy": (make.compressed("pack-quantized", strategy="hydra"), "strategy 'hydra'"),
    "no group size": (make.compressed("pack-quantized"), "group_size"),
    "no groups": (make.INT4 | {"config_groups": ["x"]}, "config_groups"),
    "a group of words": (make.INT4 | {"config_groups": {"a": "b"}}, "config_groups 'b'"),
    "targets of numbers": (
        make.compressed("pack-quantized", (3,), group_size=32),  # type: ignore[arg-type]
        "targets",
    ),
    "a broken pattern": (
        make.compressed("pack-quantized", ("re:(",), group_size=32),
        r"targets 're:\('",
    ),
    "a pattern that looks ahead": (
        make.compressed("pack-quantized", ("re:(?!lm_head).*",), group_size=32),
        r"targets 're:\(\?!lm_head\)",
    ),
    "a pattern of many groups": (
        make.compressed("pack-quantized", ("re:" + "(" * 3000 + "a" + ")" * 3000,), group_size=32),
        "targets",
    ),
    "rotated weights": (make.INT4 | {"transform_config": {"a": 1}}, "transform_config"),
    "modelopt's AWQ": (make.MODELOPT | {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_settings_that_are_not_built_are_named(name: str, tmp_path: Path) -> None:
    settings, words = UNREAD[name]
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        opened(tmp_path, case("int4"), settings)
    assert caught.value.hint and "\n" not in caught.value.message


PLACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "config.json": ({"quantization_config": make.MODELOPT}, {}),
    "the text model's part": ({"text_config": {"quantization_config": make.MODELOPT}}, {}),
    "an older key": ({"compression_config": make.MODELOPT}, {}),
    "a file beside it": (
        {},
        {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_settings_are_found_in_every_place(place: str, tmp_path: Path) -> None:
    opened(tmp_path, case("modelopt"), make.MODELOPT).close()
    config, files = PLACES[place]
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    with open_checkpoint(tmp_path, config) as checkpoint:
        assert list(checkpoint.tensors) == [WEIGHT]


def test_a_cache_that_is_quantized_leaves_weights_alone(tmp_path: Path) -> None:
    settings = {"quant_method": "compressed-tensors", "format": None, "config_groups": {}}
    weights = {"a.weight": torch.ones(2, 2), "a.k_scale": torch.ones(1)}
    with opened(tmp_path, weights, settings) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]
        assert torch.equal(checkpoint.read("a.weight"), torch.ones(2, 2))


@pytest.mark.parametrize("text", ["[]", "{", "\x00"])
def test_a_damaged_file_beside_the_weights(text: str, tmp_path: Path) -> None:
    opened(tmp_path, case("modelopt"), make.MODELOPT).close()
    (tmp_path / "hf_quant_config.json").write_text(text)
    with pytest.raises(CorruptArtifactError, match=r"hf_quant_config\.json"):
        open_checkpoint(tmp_path, {})
