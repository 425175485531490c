"""Controls are what they say: random draws among all that is in memory, drop leaves slots empty,
and all of one table face the same misses."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing
from moe_tool.evaluation.stepwise import run_stepwise
from moe_tool.policies.misses import MissPolicy, parse_miss_policy
from moe_tool.runtime.moe_layer import Decision
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from tests.policies.shown_answers import shown

CONTROLS = ("drop", "random", "next-ranked")
IDS = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (8, 64)))


@pytest.fixture(scope="module")
def decisions(tiny_bundle: Callable[..., Path]) -> dict[str, list[Decision]]:
    """What each control saw and answered, on the same text, at half of the experts."""
    found: dict[str, list[Decision]] = {}
    options = run_options(
        memory="50%", policy="exact", residency="frozen", context=64, batch=8, gates=False
    )
    with open_session(tiny_bundle("mixtral"), options) as session:
        for name in CONTROLS:
            session.use_policy(parse_miss_policy(name), residency="frozen")
            found[name] = _listen(session)
    return found


class _Heard:
    """A policy with what it saw and answered."""

    def __init__(self, policy: MissPolicy) -> None:
        self.policy = policy
        self.heard: list[Decision] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        answers = self.policy.decide(routing, resident)
        self.heard.append(
            Decision(routing=routing, answers=answers, resident=resident.copy(), spent=None)
        )
        return answers


def _listen(session: Session) -> list[Decision]:
    """`run_stepwise` puts a listener of its own in place: this one is the policy."""
    chosen = session.runner.policy
    policy = _Heard(chosen.policy)
    session.runner.policy = replace(chosen, policy=policy)
    run_stepwise(session, IDS, lambda position, logits: None)
    return policy.heard


def test_all_face_the_same_residents_and_at_first_the_same_misses(
    decisions: dict[str, list[Decision]],
) -> None:
    first_layer = min(each.routing.layer for each in decisions["drop"])
    reference = [each for each in decisions["drop"] if each.routing.layer == first_layer]
    for name in CONTROLS:
        for each in decisions[name]:
            own = next(d for d in decisions["drop"] if d.routing.layer == each.routing.layer)
            assert (each.resident == own.resident).all()
        own = [each for each in decisions[name] if each.routing.layer == first_layer]
        assert len(own) == len(reference)
        # Nothing above the first layer has been changed at the first scored token.
        assert (own[0].routing.index == reference[0].routing.index).all()
        is_missing = ~own[0].resident[PRIMARY][own[0].routing.index]
        assert is_missing.any() and not is_missing.all()


def test_drop_leaves_exactly_the_missing_slots_empty(
    decisions: dict[str, list[Decision]],
) -> None:
    for each in decisions["drop"]:
        is_missing = ~each.resident[PRIMARY][each.routing.index]
        np.testing.assert_array_equal(~each.answers.present, is_missing)
        kept = each.answers.expert[~is_missing]
        np.testing.assert_array_equal(kept, each.routing.index[~is_missing])
        np.testing.assert_array_equal(
            each.answers.weight, np.where(is_missing, 0, each.routing.weight)
        )


def test_random_draws_evenly_among_everybody_in_memory_that_the_token_does_not_use(
    decisions: dict[str, list[Decision]],
) -> None:
    drawn: dict[int, Counter[int]] = {}
    expected: dict[int, Counter[int]] = {}
    for each in decisions["random"]:
        layer, held = each.routing.layer, set(each.resident[PRIMARY].nonzero()[0].tolist())
        pairs = zip(each.routing.index.tolist(), shown(each.answers), strict=True)
        for wanted, used in pairs:
            missing = [e for e in wanted if e not in held]
            stand_ins = [e for e in used if e not in wanted]
            free = held - set(wanted)
            assert set(stand_ins) <= free and len(set(used)) == len(used)
            assert len(stand_ins) == min(len(missing), len(free))
            for expert in stand_ins:
                drawn.setdefault(layer, Counter())[expert] += 1
            for expert in free:
                share = len(stand_ins) / len(free)
                expected.setdefault(layer, Counter())[expert] += share  # type: ignore[assignment]
    for layer, counts in expected.items():
        for expert, count in counts.items():
            if count >= 30:
                # three standard deviations of a draw with that many expected
                assert abs(drawn[layer][expert] - count) < 3 * count**0.5, (layer, expert)
    assert any(count >= 30 for counts in expected.values() for count in counts.values())


def test_next_ranked_takes_the_best_scored_of_those_in_memory(
    decisions: dict[str, list[Decision]],
) -> None:
    n_checked = 0
    for each in decisions["next-ranked"]:
        held = each.resident[PRIMARY]
        assert each.routing.score is not None
        for token, wanted in enumerate(each.routing.index):
            used = shown(each.answers)[token]
            stand_ins = [e for e in used if e >= 0 and e not in wanted]
            free = [e for e in held.nonzero()[0].tolist() if e not in wanted]
            ranked = sorted(free, key=lambda e: -float(each.routing.score[token, e]))
            assert sorted(stand_ins) == sorted(ranked[: len(stand_ins)])
            n_checked += len(stand_ins)
    assert n_checked > 50
