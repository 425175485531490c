"""`bench` of a planned bundle measures what `run` would do, and options go before the plan."""

import pytest

from tests.pipeline.commands import Pipeline, moe_tool

pytestmark = pytest.mark.slow


def test_bench_takes_memory_and_eviction_of_the_plan(pipeline: Pipeline) -> None:
    folder = pipeline.folder
    planned = moe_tool(
        *("plan", "--memory", "75%", "--hardware", "laptop-16gb", "--out", "b.plan.json"),
        *("--context", "64", "--json"),
        folder=folder,
    )
    assert planned.code == 0, planned.stderr
    packed = moe_tool(
        *("pack", pipeline.model, "--plan", "b.plan.json", "--out", "planned-bench"), folder=folder
    )
    assert packed.code == 0, packed.stderr
    short = ("--prompt-tokens", "0", "--generate", "2", "--repetitions", "1", "--format", "json")
    done = moe_tool("bench", "planned-bench", *short, folder=folder)
    assert done.code == 0, done.stderr
    assert "as planned: memory" in done.stderr and "eviction" in done.stderr
    asked = moe_tool("bench", "planned-bench", *short, "--memory", "100%", folder=folder)
    assert asked.code == 0 and "as planned: memory" not in asked.stderr
