"""Traces to replay: random, and made to hurt."""

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace


def trace_of(calls, *, n_layers, n_experts, scores=None, guesses=None):
    """Return a trace of (layer position, experts) calls; `guesses` are lists of keys."""
    keys = [[layer * n_experts + e for e in sorted(experts)] for layer, experts in calls]
    forward, number, last = [], -1, n_layers
    for layer, _ in calls:
        number += layer <= last
        last = layer
        forward.append(number)
    return AccessTrace(
        n_layers=n_layers,
        n_experts=n_experts,
        layer=np.array([layer for layer, _ in calls], np.int32),
        start=np.cumsum([0, *map(len, keys)]).astype(np.int64),
        keys=np.array([key for row in keys for key in row], np.int32),
        forward=np.array(forward, np.int32),
        scores=None if scores is None else np.asarray(scores, np.uint16),
        guess_start=None
        if guesses is None
        else np.cumsum([0, *map(len, guesses)]).astype(np.int64),
        guesses=None if guesses is None else np.array([k for g in guesses for k in g], np.int32),
    )


def random_trace(rng, *, n_layers=3, n_experts=6, n_forwards=30, top_k=2, skew=1.0, union=1):
    """Return forwards through all layers with skewed, sticky choices, scores and guesses.

    `union` tokens are called together, as in a prompt.
    """
    calls, scores, guesses = [], [], []
    odds = rng.dirichlet(np.full(n_experts, 1 / skew), size=n_layers)
    chosen = []
    for _ in range(n_forwards):
        row = []
        for layer in range(n_layers):
            experts = set()
            for _ in range(union):
                p = odds[layer] + 1e-6
                experts |= set(rng.choice(n_experts, top_k, replace=False, p=p / p.sum()).tolist())
            row.append(sorted(experts))
        chosen.append(row)
    for row in chosen:
        for layer in range(n_layers):
            calls.append((layer, row[layer]))
            scores.append(rng.integers(0, 2**15, n_experts))
            named = []
            for target in range(layer + 1, min(layer + 4, n_layers)):
                experts = list(row[target])
                if rng.random() < 0.4:  # a wrong guess
                    experts[-1] = int(rng.integers(n_experts))
                named += [target * n_experts + e for e in dict.fromkeys(experts)]
            guesses.append(named)
    return trace_of(calls, n_layers=n_layers, n_experts=n_experts, scores=scores, guesses=guesses)
