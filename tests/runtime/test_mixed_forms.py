"""Bundles that mix every kind of form: what is answered exactly is what the experts themselves say,
whatever lies beside them and whatever is in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tool.artifacts.pack_plan import LayerBits
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.generation import GenerateOptions, generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.planning.made_plan import made_plan

pytestmark = pytest.mark.slow

PROMPT = [256, *b"the list of "]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint("mixtral", "bfloat16"), name="tiny")


@pytest.fixture(scope="module")
def profile(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "p.h5"
    record_profile(model, parse_sources(["builtin"]), out=out, tokens=512, seq_len=32)
    return out


def answers(bundle: Path, **options: Any) -> tuple[torch.Tensor, tuple[int, ...], int]:
    """Return logits of a prompt, tokens that follow, and how many slots a cheaper form answered."""
    asked = run_options(context=64, prompt_tokens=32, **options)
    with open_session(bundle, asked) as session, torch.inference_mode():
        logits = session.model(input_ids=torch.tensor([PROMPT])).logits
        made = generate_ids(session, (PROMPT,), GenerateOptions(max_tokens=10, ignore_eos=True))
        return logits, made.token_ids[0], session.runner.stats.decode.replica_answers


def test_nested_experts_replicas_and_removed_ones_change_no_exact_token(
    model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    """Rounded to nearest, nested bits are codes of as many bits that are not."""
    opened = open_model(model)
    opened.checkpoint.close()
    made = []
    for name, bits, replicas in (
        ("mixed", (0, 16, "2+2", 2, "2+1", 1, 8, "2+2"), "2,1,rank2"),
        ("plain", (0, 16, 4, 2, 3, 1, 8, 4), ""),
    ):
        plan = made_plan(
            identity=opened.identity,
            bits="mixed",
            expert_bits=tuple(LayerBits(layer=x, bits=bits) for x in opened.shape.layers),
        )
        pack_bundle(model, out=tmp_path / name, plan=plan, replicas=replicas, profile=profile)
        made += [answers(tmp_path / name, memory=memory) for memory in ("min", "60%", "100%")]
    for logits, tokens, n_cheaper in made[1:]:
        assert torch.equal(logits, made[0][0]) and tokens == made[0][1] and n_cheaper == 0


def test_replicas_answer_beside_experts_in_channels(
    model: LocatedModel, profile: Path, tmp_path: Path
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    pack_bundle(model, out=alone, sparse_experts="up2", profile=profile)
    pack_bundle(model, out=both, sparse_experts="up2", replicas="2", profile=profile)
    wanted = answers(alone, memory="100%")
    for memory in ("min", "60%"):
        found = answers(both, memory=memory)
        assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    _, tokens, n_cheaper = answers(both, memory="80%", policy="replica:high=0.01,low=1")
    assert n_cheaper > 0 and tokens != wanted[1]
