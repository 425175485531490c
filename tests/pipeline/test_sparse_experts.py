"""Experts in channels through the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.text.sources import parse_sources
from tests.pipeline.commands import moe_tool


@pytest.mark.slow
def test_from_pack_to_a_run_that_leaves_channels_out(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_checkpoint("mixtral")
    located = LocatedModel(folder=model, name="tiny")
    text = parse_sources(["builtin"])
    record_profile(located, text, out=tmp_path / "p.h5", tokens=1024, seq_len=32)
    pack = ("pack", model, "--profile", "p.h5", "--out", "b", "--sparse-experts", "gate2")
    packed = moe_tool(*pack, folder=tmp_path)
    assert packed.code == 0 and "run b/ --sparse-experts 0.7" in packed.stderr
    options = ("--max-tokens", "8", "--memory", "40%", "--ignore-eos", "--prompt", "The list")
    run = moe_tool("run", "b", "--sparse-experts", "0.7", *options, "--json", folder=tmp_path)
    assert run.code == 0, run.stderr
    assert "about 70% of an expert's channels are left out" in run.stderr
    assert "of channels skipped" in run.stderr and "of whole misses read" in run.stderr
    assert run.fields["sparse_experts"] == 0.7 and 0.5 < run.fields["sparsity"] < 0.9
    assert run.fields["bytes_read_per_token"] < run.fields["whole_bytes_per_token"]
    bench = ("bench", "b", "--prompt-tokens", "0", "--generate", "4", "--repetitions", "1")
    rows = moe_tool(*bench, "--sparse-experts", "0,0.7", "--json", folder=tmp_path)
    assert [row["sparse_experts"] for row in rows.fields["rows"]] == [0, 0.7]
    wrong = moe_tool("run", "b", "--sparse-experts", "1.5", *options, folder=tmp_path)
    assert wrong.code == 2 and "0 to 0.95 is possible" in wrong.stderr
