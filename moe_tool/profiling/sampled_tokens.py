"""The tokens of a profile that are looked at more closely: probed, or watched for sensitivity."""

import numpy as np

from moe_tool.text.sequences import TokenSequences

PROBE_TOKENS = 1024
"""Tokens per layer on which all experts are evaluated, in-sample and held-out together."""
SENSITIVITY_SEQUENCES = 2
SENSITIVITY_TOKENS = 128
"""Per sequence."""


def sample_rows(sequences: TokenSequences, *, seed: int) -> np.ndarray:
    """Return the rows (tokens) of the probe, ascending: three quarters in-sample, one quarter
    held-out where there is one."""
    generator = np.random.default_rng([seed, 1])
    held_out = np.repeat(sequences.held_out, sequences.ids.shape[1])
    n_held_out = min(PROBE_TOKENS // 4, int(held_out.sum()))
    chosen = [
        generator.choice(np.flatnonzero(part), min(count, int(part.sum())), replace=False)
        for part, count in ((~held_out, PROBE_TOKENS - n_held_out), (held_out, n_held_out))
    ]
    return np.sort(np.concatenate(chosen))


def watched_sequences(sequences: TokenSequences, *, seed: int) -> np.ndarray:
    """Return the beginnings of a few in-sample sequences, on which sensitivity is measured,
    [b, s] int64."""
    generator = np.random.default_rng([seed, 2])
    candidates = np.flatnonzero(~sequences.held_out)
    count = min(SENSITIVITY_SEQUENCES, len(candidates))
    chosen = np.sort(generator.choice(candidates, count, replace=False))
    return sequences.ids[chosen, :SENSITIVITY_TOKENS].astype(np.int64)
