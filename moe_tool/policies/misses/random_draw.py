"""Random draws without state: hashes of a seed and of a token's routing."""

import numpy as np

from moe_tool.artifacts.routing import Routing

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_routing(routing: Routing, seed: int) -> np.ndarray:
    """Return one 64-bit key for each token, [T] uint64."""
    key = np.full(routing.index.shape[0], (seed << 20 ^ routing.layer) % 2**64, dtype=np.uint64)
    # Rounded: the last bits differ with the number of threads.
    bits = np.round(routing.weight.astype(np.float64) * 1024).astype(np.int64).astype(np.uint64)
    for position in range(routing.index.shape[1]):
        key = mix(key ^ routing.index[:, position].astype(np.uint64))
        key = mix(key ^ bits[:, position])
    return key


def draw_uniform(routing: Routing, seed: int) -> np.ndarray:
    """Return a number from 0 up to 1 for each slot, [T, K] float64."""
    slots = np.arange(routing.index.shape[1], dtype=np.uint64)
    drawn: np.ndarray = mix(hash_routing(routing, seed)[:, None] ^ slots) / 2.0**64
    return drawn


def mix(value: np.ndarray) -> np.ndarray:
    """Return splitmix64 of each value (Steele, Lea and Flood, OOPSLA 2014)."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed
