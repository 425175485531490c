"""Penalty of misses in HOBBIT's two caches, weights searched in-sample and judged held-out.

    python benchmarks/hobbit_penalty.py PROFILE [--tokens 1000]

The penalty is per token, in reads of a primary record; a cheaper one counts as its share of bytes.
"""

import argparse
from pathlib import Path

import numpy as np

from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.planning.hobbit_weights import search_hobbit_weights
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.simulator.profile_trace import Part, decode_trace
from moe_tool.simulator.replica_answers import replica_answers, replica_limits
from moe_tool.simulator.two_caches import replay_two_caches

HIGH, LOW, PART = 0.67, 0.3, 0.2
"""Shares of slots in full and cheaper, and the cheaper forms' part of the memory"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--tokens", type=int, default=1000, help="of each part")
    parser.add_argument("--ratio", type=float, default=0.25, help="bytes of a cheaper record")
    options = parser.parse_args()
    with ProfileReader.open(options.profile) as profile:
        limits = replica_limits(profile, HIGH, LOW)
        n_tokens = options.tokens
        parts: tuple[Part, ...] = ("in-sample", "held-out")
        traces = {part: decode_trace(profile, part, max_tokens=n_tokens) for part in parts}
        answers = {
            part: replica_answers(profile, part, limits, max_tokens=n_tokens) for part in parts
        }
        every = replica_answers(profile, "held-out", limits)
    shares = np.bincount(every, minlength=3) / len(every)
    print("held-out shares in full, cheaper, not at all, %:", np.round(100 * shares, 2).tolist())
    n_experts = traces["held-out"].n_keys
    for share in (0.5, 0.25):
        slots = int((1 - PART) * share * n_experts)
        cheaper = min(n_experts, int(PART * share * n_experts / options.ratio))

        def penalty(
            choice: EvictionChoice, part: Part, slots: int = slots, cheaper: int = cheaper
        ) -> float:
            trace = traces[part]
            found = replay_two_caches(
                trace, answers[part], choice, capacity=slots, cheaper_capacity=cheaper
            )
            return found.penalty(options.ratio) / trace.n_forwards

        best = search_hobbit_weights(lambda c, p=penalty: p(c, "in-sample"), has_cheaper=True)
        names = ("lru", "lfu", "random", "hobbit")
        for choice in (best, *(parse_eviction(name) for name in names)):
            print(f"{share:.0%} {choice.name:36} {penalty(choice, 'held-out'):.3f}", flush=True)


if __name__ == "__main__":
    main()
