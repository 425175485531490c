"""GPTQ's weights are those of a decoder written anew, bit for bit, decoded or kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_tool.errors import CorruptArtifactError, MoeToolError
from moe_tool.models.stored_formats.registry import open_checkpoint
from tests.models.stored_formats.coded_weights import Coded, Tensors, words
from tests.models.stored_formats.test_damaged import changed, cut, without
from tests.models.stored_formats.test_decoding import NAME, HeldBytes, named, opened

WEIGHT = f"{NAME}.weight"
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}


def gptq(
    rng: np.random.Generator,
    n_out: int,
    n_in: int,
    *,
    bits: int = 4,
    group: int = 32,
    stored_less: int = 1,
    is_symmetric: bool = True,
    is_ordered: bool = False,
) -> Coded:
    """Codes and zero points in words, which one is taken off in the first version."""
    n_groups = -(-n_in // group)
    codes = rng.integers(0, 2**bits, (n_in, n_out))
    zero = np.full((n_groups, n_out), 2 ** (bits - 1))
    if not is_symmetric:
        zero = rng.integers(0, 2**bits, zero.shape)
    scale = ((rng.random(zero.shape) + 0.5) * 0.02).astype(np.float16)
    of_input = np.arange(n_in) // group
    if is_ordered:
        of_input = rng.permutation(of_input)
    ones = np.uint32(stored_less * sum(1 << at for at in range(0, 32, bits)))
    packed = words(zero, bits).numpy().view(np.uint32) - ones
    tensors = {
        "qweight": words(codes.T, bits).T.contiguous(),
        "qzeros": torch.from_numpy(packed.view(np.int32)),
        "scales": torch.from_numpy(scale),
        "g_idx": torch.from_numpy(of_input.astype(np.int32)),
    }
    weights = (codes - zero[of_input]).astype(np.float32) * scale[of_input].astype(np.float32)
    return Coded(tensors=tensors, weights=np.ascontiguousarray(weights.T))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as published": ({}, {}),
    "second version": ({"checkpoint_format": "gptq_v2"}, {"stored_less": 0}),
    "asymmetric": ({"sym": False}, {"is_symmetric": False}),
    "asymmetric bytes": ({"bits": 8, "sym": False}, {"bits": 8, "is_symmetric": False}),
    "pairs of bits": ({"bits": 2, "sym": False}, {"bits": 2, "is_symmetric": False}),
    "groups of 64": ({"group_size": 64}, {"group": 64}),
    "groups of 128, the last one short": ({"group_size": 128}, {"group": 128}),
    "channels": ({"group_size": -1}, {"group": 192}),
    "ordered": ({"desc_act": True, "sym": False}, {"is_ordered": True, "is_symmetric": False}),
    "ordered though settings deny it": ({}, {"is_ordered": True}),
}
NOT_KEPT = {"pairs of bits", "ordered"}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_another_decoder(case: str, tmp_path: Path) -> None:
    settings, options = CASES[case]
    coded = gptq(np.random.default_rng(7), 48, 192, **options)
    with opened(tmp_path, named(coded), GPTQ | settings) as checkpoint:
        assert list(checkpoint.tensors) == [WEIGHT]
        assert checkpoint.tensors[WEIGHT].shape == (48, 192)
        assert np.array_equal(checkpoint.read(WEIGHT).numpy(), coded.weights)
        assert (checkpoint.stored[WEIGHT].keep is None) == (case in NOT_KEPT)


@pytest.mark.parametrize("case", [case for case in CASES if "ordered" not in case])
def test_kept_codes_are_a_lossless_reordering(case: str, tmp_path: Path) -> None:
    settings, options = CASES[case]
    coded = gptq(np.random.default_rng(7), 48, 192, **options)
    with opened(tmp_path, named(coded), GPTQ | settings) as checkpoint:
        keep = checkpoint.stored[WEIGHT].keep
        if keep is None:
            assert case in NOT_KEPT
            return
        parts = {"codes": "qweight", "scale": "scales", "zero": "qzeros", "order": "g_idx"}
        kept = keep({role: coded.tensors[ending] for role, ending in parts.items()})
    assert np.array_equal(kept.decode().numpy(), coded.weights)
    assert torch.equal(kept.codes.view(torch.int32).T, coded.tensors["qweight"])
    assert torch.equal(kept.scale.T, coded.tensors["scales"])


def test_an_order_that_settings_deny_is_not_kept(tmp_path: Path) -> None:
    coded = gptq(np.random.default_rng(7), 48, 192, is_ordered=True)
    with opened(tmp_path, named(coded), GPTQ) as checkpoint:
        assert checkpoint.stored[WEIGHT].keep is not None
        with pytest.raises(CorruptArtifactError, match="out of order"):
            checkpoint.read_kept(WEIGHT)
        assert np.array_equal(checkpoint.read(WEIGHT).numpy(), coded.weights)


def test_zero_points_of_zero_carry_into_the_next_as_writers_take_them_off(tmp_path: Path) -> None:
    """One taken off a word whose first code is 0 borrows from the second: 0x11111111 - 0x…10."""
    coded = gptq(np.random.default_rng(7), 8, 32)
    tensors = dict(coded.tensors)
    tensors["qzeros"] = torch.tensor([[0x88888880 - 0x11111111]], dtype=torch.int64).int()
    with opened(tmp_path, named(Coded(tensors=tensors, weights=coded.weights)), GPTQ) as made:
        weights = made.read(WEIGHT).numpy()
    assert np.array_equal(weights[1:], coded.weights[1:])
    scale = np.float32(coded.tensors["scales"][0, 0])
    assert np.array_equal(weights[0], coded.weights[0] + 8 * scale)


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    coded = gptq(np.random.default_rng(7), 48, 192)
    save_file(named(coded), tmp_path / "model.safetensors", {"format": "pt"})
    old = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    with open_checkpoint(tmp_path, {"model_type": "mixtral"}) as checkpoint:
        assert np.array_equal(checkpoint.read(WEIGHT).numpy(), coded.weights)


@pytest.mark.parametrize("case", ["asymmetric", "ordered"])
def test_what_decoding_holds_is_announced(case: str, tmp_path: Path) -> None:
    settings, options = CASES[case]
    coded = gptq(np.random.default_rng(7), 480, 960, **options)
    with opened(tmp_path, named(coded), GPTQ | settings) as checkpoint:
        with HeldBytes() as held:
            made = checkpoint.read(WEIGHT)
        announced = made.nbytes + checkpoint.extra_bytes(WEIGHT)
        assert 0.7 * announced < held.most < announced + 20_000, held.most / announced


def tensors(**options: Any) -> Tensors:
    return named(gptq(np.random.default_rng(1), 48, 192, **options))


REFUSED: dict[str, tuple[dict[str, Any], Tensors, str]] = {
    "bits": ({"bits": 3}, tensors(), "gptq format with bits '3'"),
    "bits in words": ({"bits": "4"}, tensors(), "bits '4'"),
    "group": ({"group_size": 0}, tensors(), "group_size '0'"),
    "no group": ({"group_size": None}, tensors(), "group_size 'None'"),
    "format": ({"checkpoint_format": "marlin"}, tensors(), "checkpoint_format 'marlin'"),
    "list": ({"checkpoint_format": ["gptq"]}, tensors(), "checkpoint_format"),
    "marlin": ({"is_marlin_format": True}, tensors(), "checkpoint_format 'marlin'"),
    "words": ({"pack_dtype": "int8"}, tensors(), "pack_dtype 'int8'"),
    "dynamic": ({"dynamic": {"+:.*down.*": {"bits": 8}}}, tensors(), "dynamic"),
    "dynamic list": ({"dynamic": ["x"]}, tensors(), "dynamic"),
    "no scales": ({}, without(tensors(), "scales"), "lacks its part .*scales"),
    "no zeros": ({}, without(tensors(), "qzeros"), "lacks its part .*qzeros"),
    "no order": ({"desc_act": True}, without(tensors(), "g_idx"), "lacks its g_idx"),
    "scales": ({}, changed(tensors(), "scales", cut), r"\[5, 48\], its codes want \[6, 48\]"),
    "zeros": ({}, changed(tensors(), "qzeros", cut), r"\[5, 6\], its codes want \[6, 6\]"),
    "order": ({}, changed(tensors(), "g_idx", cut), r"\[191\], its codes want \[192\]"),
    "ragged": ({}, changed(tensors(), "qweight", lambda t: t[:, :-1]), "no matrix in whole"),
    "empty": ({}, changed(tensors(), "qweight", lambda t: t[:0]), "no matrix in whole"),
    "vector": ({}, changed(tensors(), "qweight", lambda t: t[0]), "no matrix in whole"),
    "floats": ({}, changed(tensors(), "qweight", torch.Tensor.float), "stored as F32"),
    "float order": ({}, changed(tensors(), "g_idx", torch.Tensor.float), "stored as F32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_unread(case: str, tmp_path: Path) -> None:
    settings, damaged, words_of = REFUSED[case]
    with pytest.raises(MoeToolError, match=words_of) as caught:
        opened(tmp_path, damaged, GPTQ | settings)
    assert caught.value.exit_code == 3 and caught.value.hint


@pytest.mark.parametrize("shift", [-7, 1])
def test_an_order_beyond_the_groups_is_refused(shift: int, tmp_path: Path) -> None:
    ordered = changed(tensors(is_ordered=True), "g_idx", lambda t: t + shift)
    with (
        opened(tmp_path, ordered, GPTQ | {"desc_act": True}) as checkpoint,
        pytest.raises(CorruptArtifactError, match="groups beyond its 6"),
    ):
        checkpoint.read(WEIGHT)
