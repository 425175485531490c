"""A buddy answers better than an expert drawn at random, and than nothing."""

from pathlib import Path

import pytest

from moe_tool.buddies.build_buddy_map import build_buddy_map
from moe_tool.budget.request import parse_memory
from moe_tool.demo import demo_model_path
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.profiling.recorder import record_profile
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle


@pytest.mark.slow
def test_buddies_lose_less_than_random_experts_and_than_none_beyond_the_intervals(
    tmp_path: Path,
) -> None:
    """Half of the demo's experts, which are trained, is resident; lists name all others, so that
    nothing is fetched but where every buddy is missing or in use."""
    model = LocatedModel(folder=demo_model_path(), name="demo")
    sources = parse_sources(["builtin"])
    record_profile(model, sources, out=tmp_path / "p.h5", tokens=2048, seq_len=64)
    with ProfileReader.open(tmp_path / "p.h5") as profile:
        write_json_artifact(tmp_path / "buddies.json", build_buddy_map(profile, k=15))
    pack_bundle(
        model,
        out=tmp_path / "b",
        bits="4",
        profile=tmp_path / "p.h5",
        buddies=tmp_path / "buddies.json",
    )
    options = EvaluateOptions(
        tokens=512,
        seq_len=32,
        memory=parse_memory("50%"),
        policy=parse_miss_policy("buddy"),
        also=(parse_miss_policy("random"), parse_miss_policy("drop")),
        gates=False,
        threads=1,
    )
    report = evaluate(tmp_path / "b", parse_sources(["builtin:eval"]), options)
    buddy, random, drop = (row.figures for row in report.rows)
    assert buddy.bytes_read_per_token.value == random.bytes_read_per_token.value == 0
    assert buddy.substitutions_per_token > 0.8 * random.substitutions_per_token > 2
    for other in (random, drop):
        assert buddy.kl_mean.high < other.kl_mean.low
