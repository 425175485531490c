"""From `tune pruning` to `run`, through the command line."""

import shutil
from pathlib import Path

from tests.pipeline.commands import Pipeline, moe_tool


def test_a_bundle_is_tuned_evaluated_and_run(pipeline: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(pipeline.folder / "bundle", tmp_path / "bundle")
    shutil.copy(pipeline.folder / "words.txt", tmp_path / "words.txt")
    one = ("--threads", "1")
    data = ("--data", "./words.txt", "--seq-len", "32", *one)
    run = ("run", "bundle", "--prompt", "the list", "--memory", "min", *one, "--max-tokens", "24")

    tuned = moe_tool(
        *("tune", "pruning", "bundle", *data, "--tokens", "1024", "--batch", "4", "--json"),
        folder=tmp_path,
    )
    assert tuned.code == 0, tuned.stderr
    report = tuned.fields
    assert abs(report["left_out"] - 0.2) < 0.03 and report["kl"] > 0
    assert (tmp_path / "bundle" / report["file"]).is_file()

    evaluated = moe_tool(
        *("evaluate", "bundle", *data, "--tokens", "64", "--memory", "50%", "--json"),
        *("--policy", "prune:learned", "--controls"),
        folder=tmp_path,
    )
    assert evaluated.code == 0, evaluated.stderr
    rows = {row["policy"] for row in evaluated.fields["rows"]}
    assert {"exact", "prune:learned", "prune:share=0.4", "prune:random:rate=0.2"} <= rows

    done = moe_tool(*run, "--policy", "prune:learned", "--json", folder=tmp_path)
    assert done.code == 0, done.stderr
    assert done.fields["drops"] > 0 and done.fields["skipped_fetch_bytes_per_token"] > 0
    assert "prune:learned: about 20% of a token's experts are left out" in done.stderr
    assert "not read for them" in done.stderr
