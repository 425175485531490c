"""A budget for packing: kept by taking fewer tokens, refused with a number where nothing helps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tool.errors import BudgetError
from moe_tool.models.architecture import open_model
from moe_tool.models.expert_source import ExpertSource
from moe_tool.models.kept_rows import row_order
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.pack_memory import _WORKING_COPIES, MOST_HIDDEN_BYTES, plan_pack_memory
from tests.kept import FORMATS, draw_kept
from tests.models.stored_formats.test_coded_models import write_pair
from tests.models.stored_formats.test_decoding import HeldBytes
from tests.packed import pack_bundle
from tests.packing.test_pack_bundle import located, profile_of

MIB = 2**20


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("n_tokens", [0, 100, 100_000])
def test_the_least_budget_is_named_and_works(
    n_tokens: int, is_nested: bool, tiny_checkpoint: Callable[..., Path]
) -> None:
    opened = open_model(LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny"))
    with opened.checkpoint:
        free = plan_pack_memory(opened, n_tokens=n_tokens, is_nested=is_nested, asked=None)
        with pytest.raises(BudgetError, match=r"needs .* has 1\.00 MiB") as refused:
            plan_pack_memory(opened, n_tokens=n_tokens, is_nested=is_nested, asked=MIB)
        hint = refused.value.hint or ""
        nearest = int(float(hint.split("--memory ")[1].split("MiB")[0]) * MIB)
        least = plan_pack_memory(opened, n_tokens=n_tokens, is_nested=is_nested, asked=nearest)
        assert least.needed_bytes <= nearest
        assert least.hidden_bytes <= free.hidden_bytes <= MOST_HIDDEN_BYTES
        assert ("--quantizer" in hint) == (n_tokens > 0)


def test_freed_memory_is_no_part_of_the_process(tiny_checkpoint: Callable[..., Path]) -> None:
    opened = open_model(LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny"))
    with opened.checkpoint:
        before = plan_pack_memory(opened, n_tokens=0, asked=None).needed_bytes
        # Blocks below the threshold of mmap, every other one freed, and one that stays on top.
        held = [torch.ones(24 * 2**8) for _ in range(4096)]
        kept = held[-1]
        del held
        after = plan_pack_memory(opened, n_tokens=0, asked=None).needed_bytes
    assert kept.numel() and after - before < 24 * MIB


@pytest.mark.parametrize("options", [{"bits": "native"}, {"bits": "4"}, {"in_place": True}])
def test_the_named_budget_packs(options: dict[str, Any], tmp_path: Path) -> None:
    coded, _ = write_pair("mxfp4", tmp_path)
    with pytest.raises(BudgetError) as refused:
        pack_bundle(located(coded), out=tmp_path / "b", memory="1MiB", **options)
    named = (refused.value.hint or "").split("--memory ")[1]
    pack_bundle(located(coded), out=tmp_path / "b", memory=named, **options)


def test_a_budget_is_refused_before_codes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(source: ExpertSource) -> None:
        raise AssertionError("codes were read")

    coded, _ = write_pair("mxfp4", tmp_path)
    monkeypatch.setattr(ExpertSource, "kept_precision", unread)
    with pytest.raises(BudgetError):
        pack_bundle(located(coded), out=tmp_path / "b", bits="native", memory="1MiB")
    pack_bundle(located(coded), out=tmp_path / "b", bits="4")
    with pytest.raises(AssertionError, match="codes were read"):
        pack_bundle(located(coded), out=tmp_path / "c", bits="native")


@pytest.mark.parametrize("name", FORMATS)
def test_finding_how_rows_lie_takes_four_matrices_of_floats(name: str) -> None:
    parts = [draw_kept(name, (512, 1024), seed=seed) for seed in (1, 2)]

    def convert(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tuple(tensors), dim=1).flatten(0, 1)

    with HeldBytes() as held:
        order = row_order(parts, convert)
    assert order is not None and order[:4].tolist() == [0, 512, 1, 513]
    assert held.most < 4 * 4 * 2 * 512 * 1024 < 4 * _WORKING_COPIES * 2 * 512 * 1024


def test_a_budget_changes_no_byte_where_it_is_large_enough(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral", "bfloat16")
    profile = profile_of(folder, tmp_path / "p.h5")
    for name, memory in (("a", None), ("b", "8GiB")):
        pack_bundle(
            located(folder),
            out=tmp_path / name,
            bits="2",
            quantizer="gptq",
            profile=profile,
            memory=memory,
        )
    for path in (tmp_path / "a").glob("experts-*"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    with pytest.raises(BudgetError):
        pack_bundle(located(folder), out=tmp_path / "c", bits="4", memory="1MiB")
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.part").exists()
