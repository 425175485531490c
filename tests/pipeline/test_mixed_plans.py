"""Bits of each expert's own as a user plans, packs and runs them."""

import json
from pathlib import Path

import pytest

from tests.pipeline.commands import Pipeline, moe_tool

SHIPPED = ("--hardware", "laptop-16gb")


def test_an_average_is_planned_measured_once_packed_and_run(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    plan = tmp_path / "mixed.plan.json"
    ask = (
        *("plan", "--average-bits", "2.5", "--quantizer", "fitted", "--model", pipeline.model),
        *(*SHIPPED, "--out", plan, "--json"),
    )
    made = moe_tool(*ask, folder=pipeline.folder)
    assert made.code == 0, made.stderr
    prices = next((pipeline.folder / "profiles").glob("*.fitted.bits.json"))
    assert f"wrote profiles/{prices.name}" in made.stderr
    assert f"next: moe-tool pack {pipeline.model} --plan {plan}" in made.stderr
    chosen, *others = made.fields["allocations"]
    assert chosen["name"] == "over all layers" and chosen["average_bits"] <= 2.5
    assert {each["name"] for each in others} >= {"uniform", "random", "by frequency"}
    # tests/planning/test_measured_bits.py shows that these are the best, and lose least
    bits = [each for layer in json.loads(plan.read_text())["expert_bits"] for each in layer["bits"]]
    assert len(bits) == 24 and sum(bits) / 24 == chosen["average_bits"]
    assert {width: bits.count(int(width)) for width in chosen["experts"]} == chosen["experts"]

    again = moe_tool(*ask, folder=pipeline.folder)
    assert "one pass" in made.stderr and "one pass" not in again.stderr
    assert again.fields["plan"] == made.fields["plan"]

    out = tmp_path / "b"
    packed = moe_tool(
        *("pack", pipeline.model, "--plan", plan, "--out", out, "--json"), folder=pipeline.folder
    )
    assert packed.code == 0, packed.stderr
    assert packed.fields["output_error"] > 0
    assert packed.fields["expert_bytes"] == chosen["expert_bytes"]
    run = moe_tool(
        *("run", out, "--prompt", "the list", "--max-tokens", "8", "--json"),
        folder=pipeline.folder,
    )
    assert run.code == 0, run.stderr
    low = moe_tool(
        *("run", out, "--prompt", "the list", "--max-tokens", "8", "--memory", "min", "--json"),
        folder=pipeline.folder,
    )
    assert low.code == 0, low.stderr
    assert low.fields["token_ids"] == run.fields["token_ids"]
    shown = moe_tool("inspect", prices, "--json", folder=pipeline.folder).fields
    assert shown["kind"] == "file of bit prices" and shown["quantizer"] == "fitted"

    # measured with another profile: measured again, not believed
    text = json.loads(prices.read_text())
    text.pop("sha256")
    prices.write_text(json.dumps(text | {"profile_sha256": "0" * 64}))
    third = moe_tool(*ask, folder=pipeline.folder)
    assert third.code == 0 and "measured again" in third.stderr
    prices.write_text(prices.read_text().replace('"kl_ratio": ', '"kl_ratio": 1', 1))
    damaged = moe_tool(*ask, folder=pipeline.folder)
    assert damaged.code == 3 and "Traceback" not in damaged.stderr
    prices.unlink()


def test_a_limit_of_divergence_asks_for_the_fewest_bytes(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    found = []
    for limit in ("0.001", "0.1"):
        made = moe_tool(
            *("plan", "--bits", "mixed", "--max-kl", limit, *SHIPPED),
            *("--out", tmp_path / "p.json", "--json"),
            folder=pipeline.folder,
        )
        assert made.code == 0, made.stderr
        chosen = made.fields["allocations"][0]
        assert 0.5 * float(limit) < chosen["nats"] <= float(limit)
        found.append(chosen["expert_bytes"])
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--bits", "mixed"), 2, "--average-bits"),
        (("--average-bits", "0.01"), 2, "every expert would be removed"),
        (("--average-bits", "nan"), 2, "not possible"),
        (("--average-bits", "17"), 2, "not possible"),
        (("--average-bits", "2", "--bits", "4"), 2, "contradict"),
        (("--average-bits", "2", "--max-kl", "0"), 4, "out of reach"),
        (("--average-bits", "2", "--memory", "50%"), 2, "no size"),
        (("--average-bits", "2", "--memory", "1MiB"), 4, "too small"),
        (("--average-bits", "2", "--memory", "1GiB", "--memory", "2GiB"), 2, "one --memory"),
        (("--memory", "1GiB", "--quantizer", "gptq"), 2, "mixed bits"),
        (("--average-bits", "2", "--quantizer", "gptq"), 3, "--model PATH"),
        (("--bits", "mixed", "--max-kl", "nan"), 2, "--max-kl"),
    ],
)
def test_mistakes_are_one_sentence(
    pipeline: Pipeline, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = moe_tool(
        "plan", *arguments, *SHIPPED, "--out", tmp_path / "p.json", folder=pipeline.folder
    )
    assert done.code == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "p.json").exists()


def test_the_published_program_is_planned_and_packed_beside_ours(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    plan = tmp_path / "published.plan.json"
    ask = ("plan", *SHIPPED, "--out", plan, "--json", "--cost", "published:beta=1.5")
    made = moe_tool(*ask, "--average-bits", "2.5", folder=pipeline.folder)
    assert made.code == 0, made.stderr
    names = [each["name"] for each in made.fields["allocations"]]
    assert names[:2] == ["as published", "over all layers"]
    published, ours = made.fields["allocations"][:2]
    assert published["average_bits"] == 2.5 and published["nats"] >= ours["nats"]
    for layer in json.loads(plan.read_text())["expert_bits"]:
        assert sum(layer["bits"]) == 20 and set(layer["bits"]) == {1, 2, 3}
    packed = moe_tool(
        *("pack", pipeline.model, "--plan", plan, "--out", tmp_path / "b", "--json"),
        folder=pipeline.folder,
    )
    assert packed.code == 0, packed.stderr
    assert packed.fields["expert_bytes"] == published["expert_bytes"]
    refused = moe_tool(*ask, "--average-bits", "2.54", folder=pipeline.folder)
    assert refused.code == 2 and "hint: --average-bits 2.5\n" in refused.stderr
