"""The verbs work one after the other, and their JSON fields are a contract."""

import re
from pathlib import Path

import pytest

from moe_tool.budget.request import parse_memory
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.text.sources import parse_sources
from tests.pipeline.commands import Done, Pipeline, moe_tool

pytestmark = pytest.mark.slow

EVERY_VERB = {"seconds", "peak_rss_bytes"}
PROFILE = {"profile", "tokens", "layers", "experts", "top_k", "bytes_read", "tokens_per_second"}
BUDDIES = {"buddies", "k", "by", "price_in_sample", "price_held_out"}
PACK = {"bundle", "bytes", "expert_bytes", "skeleton_bytes", "bits_per_weight", "proof"}
RUN = {
    "text",
    "prompt_tokens",
    "generated_tokens",
    "seconds_to_first_token",
    "tokens_per_second",
    "hit_rate",
    "hits",
    "misses",
    "bytes_read_per_token",
    "stall_seconds",
    "substitutions",
    "memory_budget_bytes",
    "policy",
    "prefetch",
    "prefetches",
    "prefetch_hits",
    "prefetched_bytes",
}
EVALUATE = {
    "tokens",
    "perplexity",
    "perplexity_exact",
    "kl_mean",
    "kl_p99",
    "kl_source_mean",
    "top1_agreement",
    "bytes_read_per_token",
    "hit_rate",
    "perplexity_ci95",
    "kl_mean_ci95",
    "domains",
}


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("profile", PROFILE),
        ("buddies", BUDDIES),
        ("pack", PACK),
        ("run", RUN),
        ("evaluate", EVALUATE),
    ],
)
def test_every_verb_answers_with_its_fields(pipeline: Pipeline, verb: str, names: set[str]) -> None:
    done: Done = getattr(pipeline, verb)
    assert names | EVERY_VERB <= done.fields.keys()
    assert done.fields["seconds"] > 0
    assert done.fields["peak_rss_bytes"] > 10 * 2**20


def test_profile_reads_every_byte_of_the_checkpoint_once(pipeline: Pipeline) -> None:
    size = (pipeline.model / "model.safetensors").stat().st_size
    assert 0.9 * size < pipeline.profile.fields["bytes_read"] <= 1.02 * size


def test_the_newest_artifacts_are_found_and_named(pipeline: Pipeline) -> None:
    name = pipeline.model.name
    assert f"profile: profiles/{name}.h5 (the newest in profiles/)" in pipeline.buddies.stderr
    assert (
        f"profile: profiles/{name}.h5 (the newest of {name} in profiles/)" in pipeline.pack.stderr
    )
    assert f"buddies: profiles/{name}.buddies.json (the newest" in pipeline.pack.stderr


def test_the_controls_share_a_table_with_their_policy(pipeline: Pipeline) -> None:
    rows = {row["policy"]: row for row in pipeline.evaluate.fields["rows"]}
    kinds = {"exact", "buddy", "cache-prior", "drop", "random", "next-ranked", "near-tie", "priced"}
    assert {name.partition(":")[0] for name in rows} == kinds
    assert sum(name.startswith("priced:") for name in rows) == 5
    beside = {row["policy"]: row for row in pipeline.evaluate.fields["at_no_more_bytes"]}
    assert set(beside) == kinds - {"exact", "priced"}
    for name, row in beside.items():
        read, priced = rows[name], rows[row["priced"]]
        assert row["priced"].startswith("priced")
        assert priced["bytes_read_per_token"] <= read["bytes_read_per_token"]
    assert rows["exact"]["kl_mean"] == 0
    assert rows["exact"]["top1_agreement"] == 1
    assert rows["drop"]["substitutions_per_token"] == 0
    assert pipeline.evaluate.fields["domains"].keys() == {"words"}


@pytest.mark.parametrize("policy", ["buddy", "drop", "random", "next-ranked"])
def test_a_row_of_the_table_is_what_its_policy_has_alone(pipeline: Pipeline, policy: str) -> None:
    rows = {row["policy"]: row for row in pipeline.evaluate.fields["rows"]}
    options = EvaluateOptions(
        tokens=256, seq_len=32, memory=parse_memory("50%"), policy=parse_miss_policy(policy)
    )
    text = parse_sources([f"words={pipeline.folder / 'words.txt'}"])
    alone = evaluate(pipeline.folder / "bundle", text, options).figures
    kl = alone.kl_mean.value
    assert kl > 0.01
    assert rows[policy]["kl_mean"] == pytest.approx(kl, rel=1e-4)
    assert rows[policy]["perplexity"] == pytest.approx(alone.perplexity.value, rel=1e-4)
    assert rows[policy]["substitutions_per_token"] == alone.substitutions_per_token
    assert rows[policy]["bytes_read_per_token"] == alone.bytes_read_per_token.value
    others = [row["kl_mean"] for name, row in rows.items() if name != policy]
    assert all(abs(other - kl) > 1e-4 for other in others)


def test_without_json_stdout_is_the_text_alone(pipeline: Pipeline) -> None:
    done = moe_tool(
        *("run", "bundle", "--prompt", "the list", "--max-tokens", "8", "--memory", "min"),
        folder=pipeline.folder,
    )
    assert done.code == 0
    assert done.stdout == pipeline.run.fields["text"] + "\n"
    assert "tokens/s" in done.stderr and "hit rate" in done.stderr


def test_reading_ahead_changes_the_account_and_not_the_text(pipeline: Pipeline) -> None:
    command = ("run", "bundle", "--prompt", "the list", "--max-tokens", "8", "--memory", "40%")
    done = moe_tool(*command, "--prefetch", "next-layer", "--json", folder=pipeline.folder)
    assert done.fields["text"] == pipeline.run.fields["text"]
    assert done.fields["prefetch"] == "next-layer"
    assert done.fields["prefetches"] >= done.fields["prefetch_hits"] > 0
    used = f"{done.fields['prefetches']} prefetches ({done.fields['prefetch_hits']} used, "
    assert used in done.stderr
    assert pipeline.run.fields["prefetch"] == "none" and "prefetches" not in pipeline.run.stderr


def test_a_prompt_from_stdin_or_a_file_is_the_same_prompt(pipeline: Pipeline) -> None:
    (pipeline.folder / "prompt.txt").write_text("the list")
    done = moe_tool(
        *("run", "bundle", "--prompt-file", "prompt.txt"),
        *("--max-tokens", "8", "--memory", "auto", "--json"),
        folder=pipeline.folder,
    )
    assert done.fields["text"] == pipeline.run.fields["text"]
    piped = moe_tool(
        *("run", "bundle", "-", "--max-tokens", "8", "--json"),
        folder=pipeline.folder,
        stdin="the list",
    )
    assert piped.fields["text"] == pipeline.run.fields["text"]


def test_a_lossy_policy_says_so_before_the_first_token(pipeline: Pipeline) -> None:
    done = moe_tool(
        *("run", "bundle", "--prompt", "the list", "--policy", "buddy"),
        *("--max-tokens", "4", "--memory", "50%"),
        folder=pipeline.folder,
    )
    assert done.code == 0
    assert done.stderr.startswith("buddy: ") and "text may differ" in done.stderr


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("profile", "profile"),
        ("buddies", "buddy map"),
        ("bundle", "bundle"),
        ("model", "checkpoint"),
    ],
)
@pytest.mark.parametrize("verify", [False, True])
def test_inspect_says_what_everything_is(
    pipeline: Pipeline, what: str, kind: str, verify: bool
) -> None:
    path = {
        "profile": pipeline.folder / pipeline.profile.fields["profile"],
        "buddies": pipeline.folder / pipeline.buddies.fields["buddies"],
        "bundle": pipeline.folder / "bundle",
        "model": pipeline.model,
    }[what]
    flags = ("--verify",) if verify else ()
    done = moe_tool("inspect", path, "--json", *flags, folder=pipeline.folder)
    assert done.code == 0, done.stderr
    assert done.fields["kind"] == kind
    assert done.fields["intact"] is True
    assert done.fields["model_type"] == "mixtral"


def test_inspect_reports_on_a_profile_what_profile_did(pipeline: Pipeline) -> None:
    profile = pipeline.profile.fields
    path = pipeline.folder / profile["profile"]
    done = moe_tool("inspect", path, "--json", folder=pipeline.folder)
    assert done.fields["routing"] == profile["routing"]
    assert done.fields["coverage"] == profile["coverage"]
    assert [row["percent"] for row in profile["routing"]["hot_sets"]] == [10, 25, 50]
    assert profile["routing"]["reuse"]["uses"] > 0
    shown = moe_tool("inspect", path, folder=pipeline.folder).stdout
    for words in ("hottest", "earlier MoE layer", "tokens in a row", "between two uses"):
        assert words in shown


def test_pack_says_how_it_proved_the_bundle(pipeline: Pipeline, tmp_path: Path) -> None:
    done = moe_tool(
        "pack", pipeline.model, "--bits", "4", "--out", tmp_path / "b", folder=pipeline.folder
    )
    assert done.code == 0
    found = re.search(
        r"proven by a forward of 4 tokens through both: (\S+) nats per token away from the "
        r"checkpoint, at most (\S+) is allowed: that of knowing nothing;",
        done.stderr,
    )
    assert found is not None
    assert float(found[1]) < float(found[2]) == 5.56  # ln of 260 tokens
    assert pipeline.pack.fields["proof"]["tokens"] == 4
    assert pipeline.pack.fields["proof"]["bytes_read"] > 0


def test_a_profile_packed_again_gives_the_same_bundle(pipeline: Pipeline, tmp_path: Path) -> None:
    done = moe_tool(
        "pack", pipeline.model, "--out", tmp_path / "b", "--json", folder=pipeline.folder
    )
    assert done.code == 0
    for file in sorted((pipeline.folder / "bundle").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
