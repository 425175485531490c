"""Evaluate on a tiny model: what is zero by definition is zero, the rest is counted."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.json_fields import json_fields
from moe_tool.budget.request import parse_memory
from moe_tool.errors import UsageError, WrongModelError
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.evaluation.stepwise import exact_logits, n_scored, run_stepwise
from moe_tool.models.locate import LocatedModel
from moe_tool.policies.misses import MISS_POLICIES, parse_miss_policy
from moe_tool.policies.misses.needs import BUDDIES, PRICES, REPLICAS
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import TextSource, parse_sources
from tests.packed import pack_bundle

SEQ_LEN = 16
DROP = parse_miss_policy("drop")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "bundle"
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="mixtral")
    pack_bundle(model, out=out, bits="native")
    return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextSource, ...]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "b.txt").write_text("0123456789 " * 200)
    return parse_sources([f"letters={folder / 'a.txt'}", f"digits={folder / 'b.txt'}"])


def _options(**fields: object) -> EvaluateOptions:
    settings = {
        "tokens": 6 * SEQ_LEN,
        "seq_len": SEQ_LEN,
        "memory": parse_memory("50%"),
        "gates": False,
    }
    return EvaluateOptions(**{**settings, **fields})  # type: ignore[arg-type]


def test_the_table_has_every_policy_that_the_bundle_can_run(
    bundle: Path, sources: tuple[TextSource, ...]
) -> None:
    report = evaluate(bundle, sources, _options(policy=DROP, controls=True))
    table = [spec for spec in MISS_POLICIES.values() if spec.in_controls]
    lacking = {PRICES, REPLICAS, BUDDIES}  # of this bundle
    able = [spec.name for spec in table if lacking.isdisjoint(spec.needs)]
    assert [row.policy for row in report.rows] == list(dict.fromkeys(["exact", "drop", *able]))
    assert {"near-tie", "next-ranked", "random"} <= set(able)
    assert list(report.skipped) == [spec.name for spec in table if spec.name not in able]
    assert report.setup.residency == "frozen"
    rows = {row.policy: row.figures for row in report.rows}
    exact, drop = rows["exact"], rows["drop"]
    assert exact.kl_mean.value == exact.kl_p99.value == 0.0
    assert exact.top1_agreement.value == 1.0
    assert exact.perplexity.value == exact.perplexity_exact.value == drop.perplexity_exact.value
    assert exact.bytes_read_per_token.value > 0
    assert exact.substitutions_per_token == exact.drops_per_token == 0
    assert drop.kl_mean.value > 1e-4 and drop.kl_p99.value > drop.kl_mean.value
    assert drop.bytes_read_per_token.value == 0
    assert drop.drops_per_token > 0
    assert rows["random"].substitutions_per_token > 0
    assert report.figures == drop
    assert drop.kl_mean.ci95 is not None
    assert drop.kl_mean.ci95[0] <= drop.kl_mean.value <= drop.kl_mean.ci95[1]
    assert drop.tokens == 6 * (SEQ_LEN - 2)
    assert sorted(report.domains) == ["digits", "letters"]
    assert sum(figures.tokens for figures in report.domains.values()) == drop.tokens
    fields = json.loads(json.dumps(json_fields(report)))
    for name in ("tokens", "perplexity", "kl_mean", "kl_mean_ci95", "hit_rate", "domains"):
        assert name in fields


def test_exact_perplexity_equals_that_of_the_ordinary_model(
    bundle: Path, sources: tuple[TextSource, ...], tiny_checkpoint: Callable[..., Path]
) -> None:
    """A second implementation: the whole checkpoint in transformers, loss over the same tokens."""
    options = _options(tokens=SEQ_LEN, seed=1)
    report = evaluate(bundle, sources[:1], options)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("mixtral"), dtype=torch.float32)
    from moe_tool.models.tokenizer import load_tokenizer
    from moe_tool.text.sequences import build_sequences

    text = build_sequences(
        sources[:1],
        load_tokenizer(bundle),
        vocabulary=260,
        n_tokens=SEQ_LEN,
        seq_len=SEQ_LEN,
        holdout=0,
        seed=1,
    )
    ids = torch.from_numpy(text.ids.astype(np.int64))
    with torch.no_grad():
        logits = model(ids).logits[0, 1:-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 2:]).item()
    assert report.figures.perplexity.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert report.setup.residency == "cache"
    assert report.figures.perplexity.ci95 is None  # one sequence
    assert 0 < report.figures.hit_rate.value < 1


def test_stepwise_predictions_under_exact_are_those_of_a_wide_forward(bundle: Path) -> None:
    ids = torch.randint(0, 256, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    options = run_options(memory="50%", residency="frozen", context=SEQ_LEN, batch=3)
    with open_session(bundle, options) as session:
        wide = exact_logits(session, ids)
        seen = []

        def visit(position: int, logits: torch.Tensor) -> None:
            seen.append(position)
            torch.testing.assert_close(logits, wide[:, position], atol=1e-4, rtol=1e-4)

        costs = run_stepwise(session, ids, visit)
        assert seen == list(range(1, SEQ_LEN - 1))
        assert len(seen) == n_scored(SEQ_LEN)
        shape = session.manifest.shape
        assert (costs.accesses == shape.top_k * len(shape.layers)).all()
        misses = costs.accesses - costs.hits
        assert (costs.bytes_read == misses * session.manifest.primaries[0].record_size_bytes).all()


def test_with_everything_resident_no_policy_costs_anything(
    bundle: Path, sources: tuple[TextSource, ...]
) -> None:
    report = evaluate(bundle, sources, _options(policy=DROP, memory=parse_memory("100%")))
    assert report.figures.hit_rate.value == 1.0
    # one wide forward, many small
    assert report.figures.kl_mean.value == pytest.approx(0.0, abs=1e-6)
    assert report.figures.drops_per_token == 0


def test_a_native_bundle_is_its_checkpoint(
    bundle: Path, sources: tuple[TextSource, ...], tiny_checkpoint: Callable[..., Path]
) -> None:
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="mixtral")
    report = evaluate(bundle, sources, _options(policy=DROP), reference=model)
    figures = report.figures
    assert figures.kl_source_exact_mean.value == pytest.approx(0.0, abs=1e-6)
    assert figures.kl_source_mean.value == pytest.approx(figures.kl_mean.value, rel=1e-2)
    source, exact = figures.perplexity_source.value, figures.perplexity_exact.value
    assert source == pytest.approx(exact, rel=1e-5)
    assert json_fields(report)["perplexity_source"] == figures.perplexity_source.value
    alone = evaluate(bundle, sources, _options(policy=DROP))
    assert alone.figures.perplexity_source is None


def test_a_reference_of_another_model_is_refused(
    bundle: Path, sources: tuple[TextSource, ...], tiny_checkpoint: Callable[..., Path]
) -> None:
    other = LocatedModel(folder=tiny_checkpoint("olmoe"), name="olmoe")
    with pytest.raises(WrongModelError, match="olmoe"):
        evaluate(bundle, sources, _options(), reference=other)


def test_under_cache_residency_the_order_of_sequences_does_not_matter(
    bundle: Path, sources: tuple[TextSource, ...]
) -> None:
    options = _options(policy=DROP, residency="cache", tokens=2 * SEQ_LEN)
    both = evaluate(bundle, sources, options)
    again = evaluate(bundle, sources, options)
    assert both.figures == again.figures
    assert both.setup.residency == "cache"


def test_too_short_sequences_are_refused(bundle: Path, sources: tuple[TextSource, ...]) -> None:
    with pytest.raises(UsageError, match="--seq-len 2"):
        evaluate(bundle, sources, _options(seq_len=2))
