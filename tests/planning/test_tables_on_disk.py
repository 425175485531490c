"""A plan leaves large embedding tables on disk where a run would."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.skeleton_facts import SkeletonFacts, TablesOnDisk
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.slots import ExpertRoom
from moe_tool.budget.table_choice import RowsRequest
from moe_tool.models import skeleton_facts as facts_module
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.planning.memory_account import fixed_memory
from tests.zoo.text_models import TEXT_MODELS

TABLE_BYTES = 260 * 4 * 16 * 4
"""Size in memory of gemma4's table per layer: float32 of 4 layers of 16"""
ROOMS = (ExpertRoom(record_bytes=1000, n_experts=32, n_slots_min=4),)


def facts_and_shape(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SkeletonFacts, object]:
    config = TEXT_MODELS["gemma4_text"].config("gemma4_text")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    monkeypatch.setattr(facts_module, "AUTO_ROWS", RowsRequest(kind="auto", least_bytes=1))
    opened = open_model(LocatedModel(folder=folder, name="m"))
    with opened.checkpoint:
        return facts_module.skeleton_facts(opened, folder), opened.shape


def test_the_table_is_in_memory_only_with_every_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, shape = facts_and_shape(tmp_path, monkeypatch)
    assert facts.tables_on_disk is not None
    assert facts.tables_on_disk.held_bytes == TABLE_BYTES
    fixed = fixed_memory(shape, facts, skeleton_bits="native", context=64)
    assert fixed.total_bytes - fixed.least.total_bytes == TABLE_BYTES
    whole = fixed.total_bytes + 32 * 1000
    for size, n_slots in (
        (whole, 32),
        (whole - 1, 32),  # the table goes first, as its bytes hold every expert
        (fixed.total_bytes - TABLE_BYTES + 5_500, 5),
    ):
        plan = fixed.within(MemoryRequest(kind="bytes", size_bytes=size), ROOMS)
        lines = {line.name: line.size_bytes for line in plan.lines}
        left = facts.held_bytes - lines["skeleton"]
        assert (plan.n_slots, left) == (n_slots, 0 if size == whole else TABLE_BYTES)


def test_tables_larger_than_the_skeleton_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, _ = facts_and_shape(tmp_path, monkeypatch)
    forged = TablesOnDisk(held_bytes=(facts.held_bytes or 0) + 1, reading_bytes=0)
    with pytest.raises(ValueError, match="tables are larger"):
        SkeletonFacts.model_validate(facts.model_dump() | {"tables_on_disk": forged.model_dump()})
