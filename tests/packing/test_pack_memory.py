"""A budget for packing: kept by taking fewer tokens, refused with a number where nothing helps."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import BudgetError
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.pack_memory import MOST_HIDDEN_BYTES, plan_pack_memory
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
        nearest = int(hint.split("--memory ")[1].split("MiB")[0]) * MIB
        least = plan_pack_memory(opened, n_tokens=n_tokens, is_nested=is_nested, asked=nearest)
        assert least.needed_bytes <= nearest
        assert least.hidden_bytes <= free.hidden_bytes <= MOST_HIDDEN_BYTES
        assert ("--quantizer" in hint) == (n_tokens > 0)


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
