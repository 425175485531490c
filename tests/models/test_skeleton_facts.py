"""What a profile says of the skeleton is what `pack` writes of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from moe_tool.artifacts.precision import precision_from_bits
from moe_tool.artifacts.skeleton_facts import LinearCount, SkeletonFacts
from moe_tool.errors import CorruptArtifactError
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton_facts import skeleton_facts
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.packing.skeleton_work import SkeletonWork
from tests.packed import pack_bundle
from tests.tiny_models import TINY, VOCABULARY


def facts_of(folder: Path) -> SkeletonFacts:
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    with opened.checkpoint:
        return skeleton_facts(opened, folder)


def made(**changed: object) -> SkeletonFacts:
    fields: dict[str, object] = {
        "native_bytes": 10_000,
        "linear_native_bytes": 8_000,
        "largest_tensor_bytes": 4_000,
        "linears": (LinearCount(n_outputs=17, n_inputs=33, count=2),),
        "tied_head_weights": 0,
        "config_json": "{}",
    }
    return SkeletonFacts(**(fields | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", TINY)
def test_every_size_is_the_one_that_would_be_packed(
    arch: str, dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch, dtype)
    facts = facts_of(folder)
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    with opened.checkpoint:
        for bits in ("native", "8", "4"):
            wanted = SkeletonWork(
                opened,
                precision_from_bits(bits),
                loader=SkeletonLoader(folder, opened.checkpoint),
            ).size_bytes
            assert facts.stored_bytes(bits) == wanted, bits  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", ["native", "8", "4"])
@pytest.mark.parametrize("arch", ["mixtral", "granitemoe", "deepseek_v3"])
def test_the_size_is_that_of_the_tensors_in_a_bundle(
    arch: str, bits: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(arch, "bfloat16")
    model = LocatedModel(folder=folder, name="tiny")
    pack_bundle(model, out=tmp_path / "b", skeleton_bits=bits)
    stored = load_file(tmp_path / "b" / "skeleton-00001.safetensors")
    packed_bytes = sum(tensor.nbytes for tensor in stored.values())
    facts = facts_of(folder)
    assert facts.stored_bytes(bits) == packed_bytes  # type: ignore[arg-type]
    if bits == "native":
        assert facts.largest_tensor_bytes == max(tensor.nbytes for tensor in stored.values())


def linear_weights(facts: SkeletonFacts) -> int:
    return sum(linear.n_weights for linear in facts.linears) - facts.tied_head_weights


def test_the_matrices_of_mixtral_by_hand(tiny_checkpoint: Callable[..., Path]) -> None:
    facts = facts_of(tiny_checkpoint("mixtral"))
    # Hidden 64, four heads of 16, two of them for keys and values; three layers; the head.
    assert [(m.n_outputs, m.n_inputs, m.count) for m in facts.linears] == [
        (32, 64, 6),
        (64, 64, 6),
        (VOCABULARY, 64, 1),
    ]
    assert linear_weights(facts) == 6 * 32 * 64 + 6 * 64 * 64 + VOCABULARY * 64
    assert facts.linear_native_bytes == 4 * linear_weights(facts)
    assert facts.tied_head_weights == 0
    assert facts.largest_tensor_bytes == 4 * VOCABULARY * 64


def test_a_tied_head_costs_codes_and_saves_nothing(tiny_checkpoint: Callable[..., Path]) -> None:
    facts = facts_of(tiny_checkpoint("granitemoe"))
    assert facts.tied_head_weights == VOCABULARY * 64
    assert facts.linear_native_bytes == 4 * linear_weights(facts)
    assert linear_weights(facts) == 6 * 32 * 64 + 6 * 64 * 64


def test_codes_fill_whole_tiles_by_hand() -> None:
    # 17 x 33 becomes 32 x 64, with one scale of two bytes per row (group 64) or two (group 32).
    assert made().stored_bytes("8") == 2_000 + 2 * (32 * 64 + 32 * 2)
    assert made().stored_bytes("4") == 2_000 + 2 * (32 * 64 // 2 + 32 * 2)
    assert made().stored_bytes("4", group=32) == 2_000 + 2 * (32 * 64 // 2 + 32 * 2 * 2)
    assert made().stored_bytes("native") == 10_000


@pytest.mark.parametrize(
    "changed",
    [
        {"native_bytes": -1},
        {"linear_native_bytes": 10_001},
        {"largest_tensor_bytes": 10_001},
        {"tied_head_weights": 2 * 17 * 33 + 1},
        {"config_json": " " * (2**20 + 1)},
    ],
)
def test_numbers_that_contradict_each_other_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        made(**changed)


def test_a_config_that_is_too_long_is_refused_before_any_work(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    raw = json.loads((folder / "config.json").read_text()) | {"note": "x" * 2**20}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with opened.checkpoint, pytest.raises(CorruptArtifactError, match=r"config\.json.*config_json"):
        skeleton_facts(opened, tmp_path)
