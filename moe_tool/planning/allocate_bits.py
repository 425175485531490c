"""Bit allocation: the exact minimum of the summed costs of experts under a limit of summed sizes.

Each expert takes one of a few widths, each with a cost and a size, as in Mixture Compressor (Huang
et al., arXiv:2410.06270, 2510.10962), which solves layer by layer; here all layers are solved at
once. Both solvers are exact: a dynamic program for small integer sizes, as bits are, and an integer
program for bytes.
"""

from collections.abc import Sequence

import numpy as np

WIDTHS: tuple[int, ...] = (0, 1, 2, 3, 4, 8, 16)
"""Bits that an expert may get; 0: removed, 16: native"""
_MOST_STATES = 2**26


def allocate(cost: np.ndarray, size: np.ndarray, room: int) -> np.ndarray | None:
    """Return the choice of each of n experts, [n] int64; None if even the smallest do not fit.

    Args:
        cost: [n, B] cost of each choice; infinite: not possible.
        size: [n, B] int64 size of each choice, at least 0.
        room: limit of the summed sizes.
    """
    unit = max(1, int(np.gcd.reduce(size, axis=None)))
    n_units = min(room, int(size.max(axis=1).sum())) // unit
    if (n_units + 1) * len(cost) <= _MOST_STATES:
        return _by_dynamic_program(cost, size // unit, n_units)
    return _by_integer_program(cost, size, room)


def _by_dynamic_program(cost: np.ndarray, size: np.ndarray, room: int) -> np.ndarray | None:
    """Find the best cost of the first experts for every room, expert by expert."""
    n_experts, n_choices = cost.shape
    best = np.zeros(room + 1)
    taken = np.zeros((n_experts, room + 1), dtype=np.int8)
    for expert in range(n_experts):
        following = np.full(room + 1, np.inf)
        for choice in range(n_choices):
            needed = int(size[expert, choice])
            if needed > room or not np.isfinite(cost[expert, choice]):
                continue
            total = best[: room + 1 - needed] + cost[expert, choice]
            part = following[needed:]
            is_better = total < part
            part[is_better] = total[is_better]
            taken[expert, needed:][is_better] = choice
        best = following
    if not np.isfinite(best[room]):
        return None
    chosen = np.zeros(n_experts, dtype=np.int64)
    left = room
    for expert in range(n_experts - 1, -1, -1):
        chosen[expert] = taken[expert, left]
        left -= int(size[expert, chosen[expert]])
    return chosen


def _by_integer_program(cost: np.ndarray, size: np.ndarray, room: int) -> np.ndarray | None:
    """Solve the integer program with HiGHS to proven optimality."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    n_experts, n_choices = cost.shape
    possible = np.isfinite(cost)
    flat = np.where(possible, cost, 0.0).ravel()
    one_each = kron(csr_array(np.eye(n_experts)), csr_array(np.ones((1, n_choices))))
    unit = max(room, 1)
    found = milp(
        flat / max(float(flat.max()), 1e-300),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(size.reshape(1, -1) / unit), -np.inf, room / unit),
        ],
        integrality=np.ones(flat.size),
        bounds=Bounds(0, possible.ravel().astype(np.float64)),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    chosen: np.ndarray = found.x.reshape(n_experts, n_choices).argmax(axis=1)
    # The solver's tolerance may exceed the room: excess is taken back where that costs least.
    row = np.arange(n_experts)
    while int(size[row, chosen].sum()) > room:
        smaller = _one_step_down(cost, size, chosen)
        if smaller is None:
            return None
        chosen = smaller
    return chosen


def _one_step_down(cost: np.ndarray, size: np.ndarray, chosen: np.ndarray) -> np.ndarray | None:
    """Return the change with the least cost per byte saved; None if no change saves any."""
    row = np.arange(len(chosen))
    saved = size[row, chosen][:, None] - size
    more = cost - cost[row, chosen][:, None]
    price = np.where((saved > 0) & np.isfinite(more), more / np.maximum(saved, 1), np.inf)
    expert, choice = np.unravel_index(int(price.argmin()), price.shape)
    if not np.isfinite(price[expert, choice]):
        return None
    changed = chosen.copy()
    changed[expert] = choice
    return changed


def allocate_by_layer(cost: np.ndarray, size: np.ndarray, room: int) -> np.ndarray | None:
    """Return the choices with equal room for every layer, as published, [L, E] int64.

    Args:
        cost: [L, E, B].
        size: [L, E, B] int64.
        room: room of all layers together.
    """
    found = (allocate(c, s, room // len(cost)) for c, s in zip(cost, size, strict=True))
    parts = [part for part in found if part is not None]
    return np.stack(parts) if len(parts) == len(cost) else None


def spread_evenly(n_experts: int, low: int, high: int, share: float) -> np.ndarray:
    """Return uniform choices: `high` for a share of the experts, spread over all, else `low`; [n]
    int64."""
    at = np.arange(1, n_experts + 1)
    is_high = np.floor(at * share + 1e-9) > np.floor((at - 1) * share + 1e-9)
    return np.where(is_high, high, low)


def by_rank(rank: Sequence[int] | np.ndarray, low: int, high: int, share: float) -> np.ndarray:
    """Return choices with `high` for the first `share` of a ranking, else `low`, [n] int64."""
    chosen = np.full(len(rank), low, dtype=np.int64)
    chosen[np.asarray(rank)[: int(np.floor(share * len(rank) + 1e-9))]] = high
    return chosen
