"""Divergence as the price list expects it from a profile's trace beside what is measured.

    python benchmarks/price_error.py BUNDLE PROFILE --text wiki=FILE [--budgets 15,25,40,60]
        [--tokens 2048] [--policies NAME,...] [--out rows.jsonl]

A plan is a budget and a policy: who is in memory follows from both. Its prediction is the mean
price of its answers to the profile's held-out tokens, no text and no weights needed; measured is
KL(exact || plan) on a text that the profile never saw, token by token. The rank correlation
says whether prices can choose among plans, the ratio what one nat of price is worth.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from result_rows import print_table, record_rows
from scipy.stats import spearmanr

from moe_tool.budget.request import parse_memory
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.misses import MissChoice, parse_miss_policy
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.simulator.profile_trace import part_to_replay
from moe_tool.simulator.replay_misses import replay_misses, resident_masks
from moe_tool.simulator.time_model import CallCosts
from moe_tool.text.sources import parse_sources

FREE = CallCosts(
    forward_s=0, layer_s=0, expert_s=0, read_one_s=0, read_s=0, waking_s=0, wait_s=1
)  # no time is asked for
HEADINGS = ("memory", "policy", "expected nats", "measured KL", "ratio", "kB/token")
POLICIES = (
    "priced",
    "priced:nats-per-mb=1",
    "priced:nats-per-mb=0.1",
    "priced:nats-per-mb=0.02",
    "priced:nats-per-mb=0.004",
    "next-ranked",
    "buddy",
    "drop",
)


def predictions(a: argparse.Namespace, budget: str, policies: list[MissChoice]) -> dict[str, float]:
    """Return the expected nats per token of each policy at a budget."""
    found = {}
    with (
        ProfileReader.open(a.profile) as profile,
        open_session(
            a.bundle,
            run_options(memory=budget, residency="frozen", policy="priced", gates=False),
        ) as session,
    ):
        shape = session.manifest.shape
        for policy in policies:
            session.use_policy(policy, residency="frozen")
            chosen = session.runner.policy
            assert chosen.prices is not None, "the bundle was packed without a profile"
            masks = resident_masks(
                shape.layers,
                tuple(room.pinned for room in session.plan.rooms),
                n_experts=shape.experts,
            )
            replayed = replay_misses(
                profile, part_to_replay(profile), chosen.policy, chosen.prices, masks, FREE
            )
            found[policy.name] = replayed.nats_per_token
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--budgets", default="15,25,40,60")
    parser.add_argument("--policies", default=None)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    names = list(POLICIES)
    if a.policies:  # parameters are separated by commas too: "priced;priced:nats-per-mb=1"
        names = a.policies.split(";")
    policies = [parse_miss_policy(name) for name in names]
    with record_rows(a.out, vars(a)) as kept:
        rows = [row for share in a.budgets.split(",") for row in measure(a, f"{share}%", policies)]
        expected = np.array([row["expected"] for row in rows])
        measured = np.array([row["measured"] for row in rows])
        is_priced = np.array([str(row["policy"]).startswith("priced") for row in rows])
        every = float(spearmanr(expected, measured).statistic)
        alone = float(spearmanr(expected[is_priced], measured[is_priced]).statistic)
        for row in rows:
            kept.add("plan", **row)
        kept.add("rank correlation", plans=len(rows), every=every, priced_alone=alone)
    print_table(
        HEADINGS,
        [
            [each if isinstance(each, str) else f"{each:.4g}" for each in row.values()]
            for row in rows
        ],
    )
    print(f"rank correlation over {len(rows)} plans: {every:.3f}")
    print(f"over the {int(is_priced.sum())} of them that answer by price: {alone:.3f}")


def measure(a: argparse.Namespace, budget: str, policies: list[MissChoice]) -> list[dict[str, Any]]:
    """Return a row for each policy at a budget."""
    expected = predictions(a, budget, policies)
    report = evaluate(
        a.bundle,
        parse_sources(a.text),
        EvaluateOptions(
            tokens=a.tokens,
            memory=parse_memory(budget),
            policy=policies[0],
            also=tuple(policies[1:]),
            gates=False,
            exact_fallback=False,
            residency="frozen",
            offline=True,
        ),
    )
    return [
        {
            "memory": budget,
            "policy": row.policy,
            "expected": expected[row.policy],
            "measured": row.figures.kl_mean.value,
            "ratio": row.figures.kl_mean.value / max(1e-12, expected[row.policy]),
            "kb_per_token": row.figures.bytes_read_per_token.value / 1e3,
        }
        for row in report.rows
    ]


if __name__ == "__main__":
    main()
