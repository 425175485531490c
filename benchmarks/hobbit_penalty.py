"""Penalty of misses in HOBBIT's two caches, weights searched in-sample and judged held-out.

    python benchmarks/hobbit_penalty.py PROFILE [--tokens 1000] [--fine]

The penalty is per token, in reads of a primary record; a cheaper one counts as its share of bytes.
Differences to lru, to lfu that never halves (the paper's), to our lfu and to random are in percent
of theirs, with 95 % intervals over the held-out sequences. `published` begins its records anew
with every sequence, and has the layer distance as printed or turned around; `ours` halves uses
every 128 tokens and counts, in each cache, the uses of its own form.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.planning.hobbit_weights import Weights, hobbit, search_hobbit_weights
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.simulator.profile_trace import Part, decode_trace
from moe_tool.simulator.replica_answers import replica_answers, replica_limits
from moe_tool.simulator.two_caches import replay_two_caches

HIGH, LOW, PART = 0.67, 0.3, 0.2
"""Shares of slots in full and cheaper, and the cheaper forms' part of the memory"""
BASELINES = ("lru", "lfu:halve-every=1000000", "lfu", "random")
FEW: tuple[Weights, ...] = (
    (25, 25, 25, 25),
    (1, 0, 99, 0),
    (15, 0, 80, 5),
    (25, 0, 70, 5),
    (40, 0, 55, 5),
    (10, 70, 10, 10),
    (60, 5, 30, 5),
)
"""Weights of recency, uses, precise uses and distance; the equal ones win ties"""
Penalty = Callable[[EvictionChoice, Part], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--tokens", type=int, help="of each part; all without it")
    parser.add_argument("--ratio", type=float, default=0.25, help="bytes of a cheaper record")
    parser.add_argument("--fine", action="store_true", help="search all weights, not seven mixes")
    options = parser.parse_args()
    parts: tuple[Part, ...] = ("in-sample", "held-out")
    with ProfileReader.open(options.profile) as profile:
        limits = replica_limits(profile, HIGH, LOW)
        n_tokens = options.tokens
        traces = {part: decode_trace(profile, part, max_tokens=n_tokens) for part in parts}
        answers = {
            part: replica_answers(profile, part, limits, max_tokens=n_tokens) for part in parts
        }
        seq_len = profile.header.seq_len
    by_layer = answers["held-out"].reshape(-1, len(limits), profile.header.shape.top_k)
    for at, layer in enumerate(limits):
        shares = np.bincount(by_layer[:, at].reshape(-1), minlength=3) / by_layer[:, at].size
        print(f"layer {layer}: held-out shares, %:", np.round(100 * shares, 1).tolist())
    n_experts = traces["held-out"].n_keys
    for share in (0.5, 0.25):
        slots = int((1 - PART) * share * n_experts)
        cheaper = min(n_experts, int(PART * share * n_experts / options.ratio))

        def penalty(
            choice: EvictionChoice, part: Part, slots: int = slots, cheaper: int = cheaper
        ) -> np.ndarray:
            """Return the penalty per token of each sequence."""
            trace = traces[part]
            found = replay_two_caches(
                trace, answers[part], choice, capacity=slots, cheaper_capacity=cheaper
            )
            assert trace.begins is not None
            sequence = np.cumsum(trace.begins) - 1
            return np.bincount(sequence, found.penalties(options.ratio)) / seq_len

        print_share(share, penalty, fine=options.fine)


def print_share(share: float, penalty: Penalty, *, fine: bool) -> None:
    """Print the table of one share of bytes in memory."""
    baselines = {name: penalty(parse_eviction(name), "held-out") for name in BASELINES}
    for name, costs in baselines.items():
        print(f"{share:.0%} {name:60} {costs.mean():7.3f}", flush=True)
    kinds = {
        "published": {"is_reset": True, "is_printed": True},
        "published, distance turned around": {"is_reset": True},
        "ours": {"halve_every": 128, "is_own": True},
    }
    for label, kind in kinds.items():
        best = searched(penalty, kind, fine=fine)
        costs = penalty(best, "held-out")
        told = [against(costs, other) for other in baselines.values()]
        print(f"{share:.0%} {label}: {best.name}\n    {costs.mean():.3f}", *told, flush=True)


def searched(penalty: Penalty, kind: dict[str, int | bool], *, fine: bool) -> EvictionChoice:
    """Return the policy with the weights of the least in-sample penalty."""

    def in_sample(choice: EvictionChoice) -> float:
        return float(penalty(choice, "in-sample").mean())

    if fine:
        return search_hobbit_weights(in_sample, has_cheaper=True, **kind)  # type: ignore[arg-type]
    return min((hobbit(weights, **kind) for weights in FEW), key=in_sample)  # type: ignore[arg-type]


def against(costs: np.ndarray, other: np.ndarray) -> str:
    """Return the difference to another policy's costs of the same sequences."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(costs), (2000, len(costs)))
    low, high = np.quantile(costs[drawn].mean(1) / other[drawn].mean(1) - 1, [0.025, 0.975])
    return f"{costs.mean() / other.mean() - 1:+.1%} [{low:+.1%}, {high:+.1%}]"


if __name__ == "__main__":
    main()
