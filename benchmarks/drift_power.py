"""Power and false alarms of the drift watch, from one profile of many domains.

Every set of three of the `--kind` domains is taken as a profile: its norm is fitted to their
in-sample sequences, false alarms are counted on their held-out sequences, and power on the whole of
every other domain. A window of 64 tokens counts once, at whichever check it is noticed.

    python benchmarks/drift_power.py profile.h5 --kind wiki --kind news --kind reviews --kind speech
"""

import argparse
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.artifacts.routing_norm import CHECKED_TOKENS, WINDOW_TOKENS
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.packing.fit_routing_norm import fit_routing_norm, is_unlike, watched_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--kind", action="append", required=True, help="domain of the profiles")
    parser.add_argument("--size", type=int, default=3, help="domains per profile")
    given = parser.parse_args()
    with ProfileReader.open(given.profile) as profile:
        tokens, shape = profile.tokens, profile.header.shape
        logits = {layer: profile.router_logits(layer) for layer in shape.layers}
    means = _windows_side_by_side(tokens, logits, shape.experts)  # [C, N, P, F]
    print("| profile | held-out windows | false alarms | " + " | ".join(tokens.domains) + " |")
    print("|---|---:|---:|" + "---:|" * len(tokens.domains))
    missed: dict[str, list[float]] = {}
    for kinds in combinations(given.kind, given.size):
        numbers = [tokens.domains.index(kind) for kind in kinds]
        of_kind = np.isin(tokens.domain, numbers)
        rows = np.flatnonzero(of_kind)
        norm = fit_routing_norm(
            _only(tokens, rows), shape.layers, shape.experts, _picked(logits, tokens, rows)
        )
        assert norm is not None, "the profile is too short"
        cells = []
        for number, domain in enumerate(tokens.domains):
            judged = tokens.domain == number
            if domain in kinds:
                judged &= tokens.held_out
            found = is_unlike(norm, means[:, judged].reshape(len(means), -1, means.shape[-1]))
            share = float(found.mean())
            missed.setdefault(f"{domain} held out" if domain in kinds else domain, []).append(share)
            cells.append(f"({share:.3f})" if domain in kinds else f"{share:.2f}")
        share = norm.held_out_alarms / norm.held_out_windows
        missed.setdefault("all held out", []).append(share)
        print(
            f"| {' + '.join(kinds)} | {norm.held_out_windows} | {share:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    print("\nmeans:", ", ".join(f"{name} {np.mean(found):.3f}" for name, found in missed.items()))


def _windows_side_by_side(
    tokens: TracedTokens, logits: dict[int, np.ndarray], n_experts: int
) -> np.ndarray:
    """Return mean logits after each check, [C, N, P, F]."""
    n_sequences, seq_len = tokens.ids.shape
    n_windows = seq_len // WINDOW_TOKENS
    experts = watched_experts(len(logits), n_experts)
    joined = np.concatenate([each[:, experts] for each in logits.values()], axis=1)
    whole = joined.reshape(n_sequences, seq_len, -1)[:, : n_windows * WINDOW_TOKENS]
    split = whole.reshape(n_sequences, n_windows, WINDOW_TOKENS, -1)
    return np.stack([split[:, :, :n].mean(axis=2, dtype=np.float64) for n in CHECKED_TOKENS])


def _only(tokens: TracedTokens, rows: np.ndarray) -> TracedTokens:
    return replace(
        tokens,
        ids=tokens.ids[rows],
        domain=tokens.domain[rows],
        document=tokens.document[rows],
        held_out=tokens.held_out[rows],
    )


def _picked(logits: dict[int, np.ndarray], tokens: TracedTokens, rows: np.ndarray):  # noqa: ANN202
    shape = tokens.ids.shape
    return lambda layer: logits[layer].reshape(*shape, -1)[rows].reshape(len(rows) * shape[1], -1)


if __name__ == "__main__":
    main()
