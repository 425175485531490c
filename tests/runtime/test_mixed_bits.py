"""Experts of several widths in one bundle: every one is what its own width makes of it, and what is
in memory changes nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import LayerBits, PackPlan
from moe_tool.errors import BudgetError, CorruptArtifactError, UsageError
from moe_tool.evaluation.stepwise import run_stepwise
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.planning.made_plan import made_plan

WIDTHS = (16, 8, 4, 3, 2, 1)
PROMPT = [256] + [65, 66] * 9


def _bits(shape: MoeShape, *, absent: int = 0) -> tuple[LayerBits, ...]:
    rng = np.random.default_rng(3)
    found = []
    for layer in shape.layers:
        bits = [int(rng.choice(WIDTHS)) for _ in range(shape.experts)]
        bits[:absent] = [0] * absent
        found.append(LayerBits(layer=layer, bits=tuple(bits)))
    return tuple(found)


def _plan(folder: Path, *, absent: int = 0) -> PackPlan:
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    opened.checkpoint.close()
    return made_plan(
        identity=opened.identity, bits="mixed", expert_bits=_bits(opened.shape, absent=absent)
    )


def _packed(folder: Path, out: Path, *, absent: int = 0) -> tuple[Path, PackPlan]:
    plan = _plan(folder, absent=absent)
    pack_bundle(LocatedModel(folder=folder, name="tiny"), out=out, bits="mixed", plan=plan)
    return out, plan


@pytest.mark.parametrize("absent", [0, 1])
def test_each_expert_is_what_its_width_makes_of_it(
    absent: int, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral", "bfloat16")
    out, plan = _packed(folder, tmp_path / "b", absent=absent)
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    seen = 0
    with opened.checkpoint, BundleReader.open(out) as bundle:
        bundle.verify_all()
        wanted = {entry.layer: entry.bits for entry in plan.expert_bits}
        assert len(bundle.manifest.removed) == absent * len(opened.shape.layers)
        for held in bundle.forms:
            for entry in held.table.records:
                record = torch.empty(held.record_size_bytes, dtype=torch.uint8)
                bundle.read_record_into(entry.layer, entry.expert, record, form=held.index)
                found = held.form.decode(record)
                width = wanted[entry.layer][entry.expert]
                for name, exact in opened.experts.read(entry.layer, entry.expert).items():
                    weight = found[name]
                    if width == 16:
                        assert isinstance(weight, FloatWeight)
                        assert torch.equal(weight.values, exact)
                    else:
                        assert isinstance(weight, IntegerWeight) and weight.width_bits == width
                        assert torch.equal(dequantize(weight), dequantize(quantize(exact, width)))
                seen += 1
    assert seen == (opened.shape.experts - absent) * len(opened.shape.layers)


@pytest.mark.parametrize("eviction", ["lru", "lfu", "pinned+lru"])
def test_the_budget_changes_no_token(
    eviction: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out, _ = _packed(tiny_checkpoint("qwen3_moe", "bfloat16"), tmp_path / "b", absent=1)
    made = []
    for memory in ("min", "60%", "100%"):
        options = run_options(memory=memory, context=64, prompt_tokens=32, eviction=eviction)
        with open_session(out, options) as session, torch.inference_mode():
            logits = session.model(input_ids=torch.tensor([PROMPT])).logits
            tokens = generate_ids(session, (PROMPT,), GenerateOptions(max_tokens=12)).token_ids
            made.append((logits, tokens))
    for logits, tokens in made[1:]:
        assert torch.equal(logits, made[0][0])
        assert tokens == made[0][1]


def test_an_absent_expert_answers_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The bundle's logits are those of a model whose absent experts put out zeros."""
    folder = tiny_checkpoint("mixtral", "float32")
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    opened.checkpoint.close()
    shape = opened.shape
    bits = tuple(
        LayerBits(layer=layer, bits=(0, *(16,) * (shape.experts - 1))) for layer in shape.layers
    )
    plan = made_plan(identity=opened.identity, bits="mixed", expert_bits=bits)
    out = tmp_path / "b"
    pack_bundle(LocatedModel(folder=folder, name="tiny"), out=out, bits="mixed", plan=plan)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data[0] = 0
    with open_session(out, run_options(memory="100%", context=64, prompt_tokens=32)) as session:
        assert session.manifest.removed == tuple((layer, 0) for layer in shape.layers)
        with torch.inference_mode():
            found = session.model(input_ids=torch.tensor([PROMPT])).logits
            expected = model(input_ids=torch.tensor([PROMPT])).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_too_small_a_budget_names_one_that_works(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out, _ = _packed(tiny_checkpoint("mixtral", "bfloat16"), tmp_path / "b")
    with pytest.raises(BudgetError, match="too small|at least"):
        open_session(out, run_options(memory="1MiB", context=64))


def test_mixed_bits_come_with_a_plan_of_every_layer(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral", "bfloat16")
    model = LocatedModel(folder=folder, name="tiny")
    with pytest.raises(UsageError, match="plan"):
        pack_bundle(model, out=tmp_path / "b", bits="mixed")
    plan = _plan(folder)
    short = plan.model_copy(update={"expert_bits": plan.expert_bits[1:]})
    with pytest.raises(CorruptArtifactError, match="layers"):
        pack_bundle(model, out=tmp_path / "b", bits="mixed", plan=short)


def test_an_interrupted_pack_ends_with_the_same_bytes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_tool.formats.bundle_writer import BundleWriter

    folder = tiny_checkpoint("mixtral", "bfloat16")
    whole, _ = _packed(folder, tmp_path / "whole", absent=1)
    write, count = BundleWriter.write_record, [0]

    def stop(self: BundleWriter, *arguments: object, **options: object) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        write(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(BundleWriter, "write_record", stop)
    with pytest.raises(KeyboardInterrupt):
        _packed(folder, tmp_path / "b", absent=1)
    monkeypatch.undo()
    _packed(folder, tmp_path / "b", absent=1)
    for path in whole.iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"removed": [', '"removed": [[0, 0],'),
        ('"width_bits": 2', '"width_bits": 3'),
        ('"forms": [', '"forms": [7,'),
    ],
)
def test_a_damaged_manifest_is_refused(
    old: str, new: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import re

    from moe_tool.artifacts.bundle_manifest import BundleManifest

    out, _ = _packed(tiny_checkpoint("mixtral", "bfloat16"), tmp_path / "b", absent=1)
    path = out / "manifest.json"
    text = re.sub(r',\n "sha256": "[0-9a-f]{64}"\n}\n\Z', "\n}\n", path.read_text())
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(CorruptArtifactError):
        BundleReader.open(out)
    path.write_text(text)
    read_json_artifact(path, BundleManifest)


def test_predictions_count_no_access_to_an_absent_expert(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out, _ = _packed(tiny_checkpoint("mixtral", "bfloat16"), tmp_path / "b", absent=2)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    with open_session(out, run_options(memory="100%", context=64, prompt_tokens=32)) as session:
        shape, stored = session.bundle.manifest.shape, session.runner.stored
        costs = run_stepwise(session, ids, lambda position, logits: None)
    n_slots = shape.top_k * len(shape.layers)
    assert stored
    assert (costs.accesses <= n_slots).all() and (costs.accesses < n_slots).any()
    assert not costs.drops.any() and not costs.substitutions.any()
    assert (costs.hits <= costs.accesses).all()


@pytest.mark.parametrize("policy", ["near-tie:alpha=1", "drop", "random", "next-ranked"])
def test_every_policy_answers_misses_and_never_by_what_was_removed(
    policy: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out, _ = _packed(tiny_checkpoint("mixtral", "bfloat16"), tmp_path / "b", absent=2)
    options = run_options(memory="50%", context=64, prompt_tokens=32, policy=policy, gates=False)
    with open_session(out, options) as session:
        costs = run_stepwise(session, torch.tensor([PROMPT]), lambda position, logits: None)
        top_k = session.bundle.manifest.shape.top_k * len(session.bundle.manifest.shape.layers)
    assert (costs.accesses <= top_k).all() and (costs.accesses < top_k).any()
    answered = costs.substitutions + costs.drops
    assert answered.sum() > 0 and (answered <= costs.accesses).all()


@pytest.mark.parametrize("policy", ["priced:kl=inf,reroute=inf", "prune:share=1"])
def test_what_is_left_out_beside_absent_experts_is_counted(
    policy: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral", "bfloat16")
    model = LocatedModel(folder=folder, name="tiny")
    profile = tmp_path / "p.h5"
    record_profile(model, parse_sources(["builtin"]), out=profile, tokens=512, seq_len=32)
    pack_bundle(
        model, out=tmp_path / "b", bits="mixed", plan=_plan(folder, absent=2), profile=profile
    )
    options = run_options(memory="50%", context=64, prompt_tokens=32, policy=policy)
    with open_session(tmp_path / "b", options) as session:
        costs = run_stepwise(session, torch.tensor([PROMPT]), lambda position, logits: None)
    assert costs.drops.sum() > 0
