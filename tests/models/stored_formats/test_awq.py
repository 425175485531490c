"""AWQ's weights are those of a decoder written anew, bit for bit, decoded or kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_tool.errors import MoeToolError
from tests.models.stored_formats.coded_weights import Coded, Tensors
from tests.models.stored_formats.test_damaged import changed, cut, without
from tests.models.stored_formats.test_decoding import NAME, HeldBytes, named, opened

WEIGHT = f"{NAME}.weight"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs in a word from its lowest half byte on"""


def awq_words(codes: NDArray[np.int64]) -> torch.Tensor:
    made = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for place, output in enumerate(_ORDER):
        made |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(made.view(np.int32))


def awq(rng: np.random.Generator, n_out: int, n_in: int, *, group: int = 32) -> Coded:
    codes = rng.integers(0, 16, (n_in, n_out))
    zero = rng.integers(0, 16, (n_in // group, n_out))
    scale = ((rng.random(zero.shape) + 0.5) * 0.02).astype(np.float16)
    tensors = {
        "qweight": awq_words(codes),
        "qzeros": awq_words(zero),
        "scales": torch.from_numpy(scale),
    }
    of_input = np.arange(n_in) // group
    weights = (codes - zero[of_input]).astype(np.float32) * scale[of_input].astype(np.float32)
    return Coded(tensors=tensors, weights=np.ascontiguousarray(weights.T))


GROUPS: dict[int, dict[str, Any]] = {
    32: {},
    64: {"group_size": 64},
    192: {"group_size": -1, "version": "GEMM"},
}


@pytest.mark.parametrize("group", GROUPS)
def test_weights_are_those_of_another_decoder(group: int, tmp_path: Path) -> None:
    coded = awq(np.random.default_rng(7), 48, 192, group=group)
    with opened(tmp_path, named(coded), AWQ | GROUPS[group]) as checkpoint:
        assert list(checkpoint.tensors) == [WEIGHT]
        assert checkpoint.tensors[WEIGHT].shape == (48, 192)
        found = checkpoint.read(WEIGHT)
        assert found.is_contiguous() and np.array_equal(found.numpy(), coded.weights)


@pytest.mark.parametrize("group", GROUPS)
def test_kept_codes_are_a_lossless_reordering(group: int, tmp_path: Path) -> None:
    coded = awq(np.random.default_rng(7), 48, 192, group=group)
    with opened(tmp_path, named(coded), AWQ | GROUPS[group]) as checkpoint:
        keep = checkpoint.stored[WEIGHT].keep
    assert keep is not None
    roles = {"codes": "qweight", "scale": "scales", "zero": "qzeros"}
    kept = keep({role: coded.tensors[ending] for role, ending in roles.items()})
    assert np.array_equal(kept.decode().numpy(), coded.weights)
    codes = torch.stack((kept.codes & 15, kept.codes >> 4), dim=-1).view(48, 192)
    assert torch.equal(awq_words(codes.T.numpy().astype(np.int64)), coded.tensors["qweight"])
    assert kept.zero is not None
    assert torch.equal(awq_words(kept.zero.T.numpy().astype(np.int64)), coded.tensors["qzeros"])
    assert torch.equal(kept.scale.T, coded.tensors["scales"])


def test_what_decoding_holds_is_announced(tmp_path: Path) -> None:
    with opened(tmp_path, named(awq(np.random.default_rng(7), 480, 960)), AWQ) as checkpoint:
        with HeldBytes() as held:
            made = checkpoint.read(WEIGHT)
        announced = made.nbytes + checkpoint.extra_bytes(WEIGHT)
        assert 0.7 * announced < held.most < announced + 20_000, held.most / announced


def tensors() -> Tensors:
    return named(awq(np.random.default_rng(1), 48, 192))


REFUSED: dict[str, tuple[dict[str, Any], Tensors, str]] = {
    "bits": ({"bits": 8}, tensors(), "awq format with bits '8'"),
    "no zeros": ({"zero_point": False}, tensors(), "zero_point 'False'"),
    "gemv": ({"version": "gemv"}, tensors(), "version 'gemv'"),
    "exllama": ({"version": "exllama"}, tensors(), "version 'exllama'"),
    "list": ({"version": ["gemm"]}, tensors(), "version"),
    "group": ({"group_size": True}, tensors(), "group_size 'True'"),
    "odd group": ({"group_size": 36}, tensors(), "groups of 36 do not divide"),
    "no scales": ({}, without(tensors(), "scales"), "lacks its part .*scales"),
    "no zero points": ({}, without(tensors(), "qzeros"), "lacks its part .*qzeros"),
    "scales": ({}, changed(tensors(), "scales", cut), r"\[5, 48\], its codes want \[6, 48\]"),
    "zeros": ({}, changed(tensors(), "qzeros", cut), r"\[5, 6\], its codes want \[6, 6\]"),
    "empty": ({}, changed(tensors(), "qweight", lambda t: t[:0]), "is no matrix's"),
    "vector": ({}, changed(tensors(), "qweight", lambda t: t[0]), "is no matrix's"),
    "gptq": ({}, changed(tensors(), "qweight", lambda t: t.T[:, :32]), "do not divide"),
    "floats": ({}, changed(tensors(), "qweight", torch.Tensor.float), "stored as F32"),
    "integer scales": ({}, changed(tensors(), "scales", torch.Tensor.int), "stored as I32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_unread(case: str, tmp_path: Path) -> None:
    settings, damaged, words_of = REFUSED[case]
    with pytest.raises(MoeToolError, match=words_of) as caught:
        opened(tmp_path, damaged, AWQ | settings)
    assert caught.value.exit_code == 3 and caught.value.hint
