"""SMoE's bands over a batch, and its division of the misses that bands leave."""

from dataclasses import replace

import numpy as np
import pytest

from moe_tool.artifacts.routing import Routing, count_answers
from moe_tool.errors import UsageError
from moe_tool.policies.misses import PolicyInputs, parse_miss_policy

LAYER, N_EXPERTS, TOP_K = 2, 32, 4


def _reweigh(logits, index, present):
    chosen = np.exp(np.take_along_axis(logits.astype(np.float32), index, axis=1))
    chosen = np.where(present, chosen, 0)
    return chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1e-9)


INPUTS = PolicyInputs(reweigh={LAYER: _reweigh}, forms=("native", "2"), top_k=TOP_K)


def _routing(logits, top_k):
    logits = np.asarray(logits, dtype=np.float16)
    index = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    present = np.ones(index.shape, dtype=bool)
    weight = _reweigh(logits, index, present).astype(np.float32)
    sequence = np.arange(len(index))
    return Routing(
        layer=LAYER,
        index=index,
        present=present,
        weight=weight,
        score=logits,
        logits=logits,
        sequence=sequence,
    )


def _recorded(n_tokens=300):
    return _routing(np.random.default_rng(5).normal(size=(n_tokens, N_EXPERTS)), TOP_K)


def _decide(policy, routing, resident):
    return parse_miss_policy(policy).make(INPUTS).decide(routing, resident)


def _half_resident(*, with_replicas):
    full = np.arange(N_EXPERTS) % 2 == 0
    return np.stack([full, ~full if with_replicas else np.zeros_like(full)])


def test_a_wider_band_needs_fewer_reads_and_spares_what_scored_above_it():
    routing, resident = _recorded(), _half_resident(with_replicas=False)
    hits = []
    for alpha in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        answers = _decide(f"near-tie:alpha={alpha}", routing, resident)
        hits.append(int(resident[0][answers.expert].sum()))
        share = np.exp(routing.logits.astype(float))
        limit = np.sort(share, axis=1)[:, -TOP_K - 1, None].repeat(TOP_K, axis=1)
        own = np.take_along_axis(share, routing.index, axis=1)
        changed = answers.expert != routing.index
        assert (own[changed] < (1 + alpha) * limit[changed]).all()
    assert hits == sorted(hits) and hits[0] < hits[-1]


def test_what_another_token_fetches_in_any_case_may_answer_where_that_is_asked_for():
    first = [5.0, 3.0, 2.99, 0.0, 0.0, 0.0]  # 1 and 2 are a near-tie
    second = [0.0, 0.0, 5.0, 4.0, 0.0, 0.0]  # 2 and 3 are far above the rest
    routing, resident = _routing([first, second], 2), np.zeros((2, 6), dtype=bool)
    assert (_decide("near-tie", routing, resident).expert == routing.index).all()
    answers = _decide("near-tie:batch=1", routing, resident)
    assert answers.expert.tolist() == [[0, 2], [2, 3]]
    alone = _decide("near-tie:batch=1", _routing([first], 2), resident)
    assert alone.expert.tolist() == [[0, 1]]
    # a low expert that another token fetches stays, though a resident one could stand in
    third = [0.0, 5.0, 0.0, 4.0, 0.0, 0.0]
    resident[0, 2] = True
    both = _routing([first, third], 2)
    assert _decide("near-tie", both, resident).expert[0].tolist() == [0, 2]
    assert _decide("near-tie:batch=1", both, resident).expert[0].tolist() == [0, 1]


def test_the_lightest_misses_are_answered_by_replicas_and_the_heaviest_read():
    routing, resident = _recorded(), _half_resident(with_replicas=True)
    answers = _decide("smoe:alpha=0,read-ms=1,replica-ms=1", routing, resident)
    assert (answers.expert == routing.index).all() and answers.present.all()
    is_missing = ~resident[0][routing.index]
    is_low = answers.form == 1
    assert not is_low[~is_missing].any()
    n_missing, n_low = is_missing.sum(axis=1), is_low.sum(axis=1)
    assert (n_low == n_missing // 2).all()  # the first is read: equal costs take turns
    is_read = is_missing & ~is_low
    lightest_read = np.where(is_read, routing.weight, np.inf).min(axis=1)
    heaviest_low = np.where(is_low, routing.weight, -np.inf).max(axis=1)
    assert (heaviest_low <= lightest_read).all()


def test_no_token_depends_on_another_and_what_has_no_replica_is_read():
    routing, resident = _recorded(40), _half_resident(with_replicas=True)
    resident[1, :16] = False
    together = _decide("smoe", routing, resident)
    assert not (together.form == 1)[routing.index < 16].any()
    assert count_answers(routing, together).replica_answers > 0
    for at in range(40):
        rows = slice(at, at + 1)
        alone = replace(
            routing,
            **{
                name: getattr(routing, name)[rows]
                for name in ("index", "present", "weight", "score", "logits", "sequence")
            },
        )
        answers = _decide("smoe", alone, resident)
        assert (answers.expert == together.expert[rows]).all()
        assert (answers.form == together.form[rows]).all()
        assert (answers.weight == together.weight[rows]).all()


def test_a_replica_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="no form 3"):
        parse_miss_policy("smoe:form=3").make(INPUTS)
