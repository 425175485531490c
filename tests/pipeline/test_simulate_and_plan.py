"""simulate and plan as a user types them, on a real little profile; pack and run follow."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.commands import Pipeline, moe_tool

SHIPPED = ("--hardware", "laptop-16gb")


def test_simulate_answers_for_every_budget_and_policy(pipeline: Pipeline, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    done = moe_tool("simulate", *SHIPPED, "--json", "--plot", picture, folder=pipeline.folder)
    assert done.code == 0, done.stderr
    rows = done.fields["rows"]
    found = {(row["memory"], row["eviction"]): row for row in rows}
    assert len({row["memory"] for row in rows}) == 10
    for (memory, policy), row in found.items():
        if policy in ("static-hot", "pinned+lru"):
            continue  # what is pinned was read before the first token
        assert row["hit_rate"] <= found[memory, "belady"]["hit_rate"] + 1e-12
    assert found["100%", "static-hot"]["hit_rate"] == 1
    assert found["100%", "static-hot"]["to_belady"] is None
    assert done.fields["part"] == "held-out" and done.fields["cliff"]["experts"] > 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_simulate_draws_a_page_and_reads_chosen_rows(pipeline: Pipeline, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    done = moe_tool(
        *("simulate", *SHIPPED, "--memory", "25%,50%", "--eviction", "lru", "--plot", page),
        folder=pipeline.folder,
    )
    assert done.code == 0, done.stderr
    assert "belady" in done.stdout and "wrote" in done.stderr
    assert "experts at native precision, as pack keeps them; --bits" in done.stdout
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "belady (bound)" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("simulate", "--memory", "x"), 2, "not a budget"),
        (("simulate", "--eviction", "belady"), 2, "not known"),
        (("simulate", "--plot", "out.pdf"), 2, ".png"),
        (("simulate", "nowhere.h5"), 3, "nowhere.h5"),
        (("simulate", "--hardware", "abacus"), 2, "laptop-16gb"),
        (("simulate", "words.txt"), 3, "words.txt"),
        (("plan", "--memory", "1MiB"), 4, "nearest that works"),
        (("plan", "--memory", "x"), 2, "not a memory budget"),
        (("plan", "--memory", "auto"), 2, "--memory auto"),
        (("plan", "--memory", "50%", "--max-loss", "much"), 2, "--max-loss"),
        (("plan", "--memory", "50%", "--disk", "fast"), 2, "not a size"),
        (("plan",), 2, "--memory"),
        (("plan", "--memory", "50%", "--max-kl", "-1"), 2, "--max-kl"),
        (("plan", "--memory", "50%", "--max-kl", "nan"), 2, "--max-kl"),
        (("plan", "--memory", "50%", "--max-kl", "1", "--max-loss", "1%"), 2, "the same"),
        (("plan", "--memory", "50%", "--bits", "4", "--max-kl", "0"), 4, "out of reach"),
        (("run", "bundle", "--prompt", "x", "--eviction", "lru:x"), 2, "per-layer"),
        (("run", "bundle", "--prompt", "x", "--policy", "drop", "--eviction", "lfu"), 2, "frozen"),
    ],
)
def test_mistakes_are_one_sentence(
    pipeline: Pipeline, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = moe_tool(*arguments, folder=pipeline.folder)
    assert done.code == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_plan_is_written_packed_and_followed(pipeline: Pipeline, tmp_path: Path) -> None:
    plan = tmp_path / "tiny.plan.json"
    made = moe_tool(
        *("plan", "--memory", "60%", *SHIPPED, "--bits", "4", "--out", plan, "--json"),
        folder=pipeline.folder,
    )
    assert made.code == 0, made.stderr
    fields = made.fields
    best, lru = fields["best"][0], fields["lru"]
    # bundle/ is there, of other bits: another folder is proposed
    assert f"--plan {plan} --out planned/" in made.stderr
    assert f"pack PATH/TO/{pipeline.model.name} " in made.stderr
    assert best["bytes_per_token"] <= lru["bytes_per_token"]
    assert json.loads(plan.read_text())["eviction"] == best["eviction"]
    total = sum(line["size_bytes"] for line in fields["plan"]["lines"])
    assert total <= fields["plan"]["memory_bytes"]
    assert fields["neighbours"][-1]["ratio"] >= 0.99

    packed = moe_tool(
        "pack", pipeline.model, "--plan", plan, "--out", tmp_path / "b", folder=pipeline.folder
    )
    assert packed.code == 0, packed.stderr
    trace = tmp_path / "run.h5"
    run = moe_tool(
        *("run", tmp_path / "b", "--prompt", "the list", "--max-tokens", "8", "--json"),
        *("--record-trace", trace),
        folder=pipeline.folder,
    )
    assert run.code == 0, run.stderr
    assert "as planned" in run.stderr
    assert run.fields["eviction"] == best["eviction"]
    assert run.fields["memory_budget_bytes"] == fields["plan"]["memory_bytes"]
    replayed = moe_tool("simulate", trace, *SHIPPED, "--json", folder=pipeline.folder)
    assert replayed.fields["hits"] == replayed.fields["predicted_hits"] == run.fields["hits"]
    of_plan = moe_tool("inspect", plan, "--json", folder=pipeline.folder).fields
    assert of_plan["kind"] == "plan" and of_plan["intact"] is True
    assert (of_plan["bits"], of_plan["eviction"]) == ("4", best["eviction"])
    of_trace = moe_tool("inspect", trace, "--json", folder=pipeline.folder).fields
    assert of_trace["kind"] == "trace of a run" and of_trace["model_type"] == "mixtral"
    assert of_trace["hits"] == run.fields["hits"]

    other = moe_tool(
        *("pack", pipeline.model, "--plan", plan, "--bits", "8", "--out", tmp_path / "c"),
        folder=pipeline.folder,
    )
    assert other.code == 2 and "--bits 4" in other.stderr
    plan.write_text(plan.read_text().replace("60", "61", 1))
    damaged = moe_tool(
        "pack", pipeline.model, "--plan", plan, "--out", tmp_path / "d", folder=pipeline.folder
    )
    assert damaged.code == 3 and "Traceback" not in damaged.stderr


def test_several_budgets_are_a_curve_and_write_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "none.json"
    done = moe_tool(
        *(
            "plan",
            "--memory",
            "40%",
            "--memory",
            "100%",
            "--memory",
            "1MiB",
            "--out",
            out,
            *SHIPPED,
        ),
        *("--json",),
        folder=pipeline.folder,
    )
    assert done.code == 0, done.stderr
    speeds = [each["plan"]["prediction"]["tokens_per_second"] for each in done.fields["plans"]]
    assert len(speeds) == 2 and speeds[0] <= speeds[1]
    everything = done.fields["plans"][1]
    assert [row["eviction"] for row in everything["best"]] == ["lru"]
    assert everything["plan"]["prediction"]["bytes_per_token"] == 0
    assert everything["plan"]["prediction"]["hit_rate"] == 1
    assert list(done.fields["refused"]) == ["1MiB"] and not out.exists()


def test_a_limit_of_divergence_is_planned_for_packed_and_kept(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    plan = tmp_path / "lossy.plan.json"

    def planned(*limit: str) -> Any:
        slow = ("--memory", "50%", *SHIPPED, "--disk", "1MB", "--context", "64")
        done = moe_tool("plan", *slow, *limit, "--out", plan, "--json", folder=pipeline.folder)
        assert done.code == 0, done.stderr
        return done.fields["plan"]

    exact = planned("--max-kl", "0")
    assert exact["policy"] is None and exact["prediction"]["kl"] == 0
    loose = planned("--max-kl", "0.5")
    assert loose["policy"].startswith("priced") and loose["replicas"]
    assert loose["prediction"]["kl"] <= 0.5
    assert loose["prediction"]["bytes_per_token"] < exact["prediction"]["bytes_per_token"]
    assert loose["prediction"]["tokens_per_second"] > exact["prediction"]["tokens_per_second"]
    held = [tuple(key) for form in loose["forms"] for key in form["resident"]]
    assert len(set(held)) == len(held)  # in one form at most
    n_slots = loose["prediction"]["expert_slots"]
    used = sum(len(form["resident"]) * form["record_bytes"] for form in loose["forms"])
    assert used <= n_slots * loose["forms"][0]["record_bytes"]

    packed = moe_tool(
        "pack", pipeline.model, "--plan", plan, "--out", tmp_path / "b", folder=pipeline.folder
    )
    assert packed.code == 0, packed.stderr
    words = ("run", tmp_path / "b", "--prompt", "the list", "--max-tokens", "8", "--json")
    run = moe_tool(*words, "--memory", "50%", folder=pipeline.folder)
    assert run.code == 0, run.stderr
    assert run.fields["policy"] == loose["policy"] and "planned: expected KL" in run.stderr
    assert run.fields["replica_answers"] > 0
    assert run.fields["expected_kl_limit"] == pytest.approx(0.5 - loose["prediction"]["kl_of_bits"])
    plain = moe_tool(*words, "--policy", "exact", folder=pipeline.folder)
    assert plain.fields["policy"] == "exact" and plain.fields["replica_answers"] == 0
    without = moe_tool(
        *("pack", pipeline.model, "--plan", plan, "--replicas", "8", "--out", tmp_path / "c"),
        folder=pipeline.folder,
    )
    assert without.code == 2 and "leave --replicas to the plan" in without.stderr
    shown = moe_tool("inspect", plan, folder=pipeline.folder)
    assert loose["policy"] in shown.stdout
