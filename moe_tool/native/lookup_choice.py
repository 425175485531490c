"""Choice between multiplying and looking up products of 1- and 2-bit weights, timed per process.

Both ways are bit-identical, so the timing cannot change an output.
"""

import time
from dataclasses import dataclass
from functools import cache

import torch

from moe_tool.native.kernels import NativeLinear, use_lookup
from moe_tool.quantization.bit_packing import ROWS, n_row_blocks, plane_bytes
from moe_tool.quantization.weights import IntegerWeight

LOOKUP_BITS = (1, 2)
TOKENS = (1, 4, 16)
"""Numbers of tokens that are timed; products of more tokens are multiplied"""
_SHAPE = (1024, 2048)
_GROUP = 64
_REPETITIONS = 4
_WORTH = 1.05
"""Speedup below which a difference counts as noise"""
_ANY_TOKENS = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupTime:
    """Times of one product, multiplied and looked up."""

    bits: int
    tokens: int
    multiply_s: float
    lookup_s: float


@cache
def choose_lookup() -> tuple[LookupTime, ...]:
    """Time both ways, use the faster one for the rest of the process, and return the times.

    Takes some 20 ms with the threads that are set; returns no times without lookup kernels.
    """
    return tuple(time for bits in LOOKUP_BITS for time in _choose(bits))


def chosen_tokens(times: tuple[LookupTime, ...], bits: int) -> int:
    """Return the largest number of tokens whose products of this width are looked up; 0: none.

    It is the largest timed number at which lookup is faster, with none below where it is slower.
    """
    most = 0
    for row in sorted((row for row in times if row.bits == bits), key=lambda row: row.tokens):
        if row.lookup_s >= _WORTH * row.multiply_s:
            break
        if row.multiply_s >= _WORTH * row.lookup_s:
            most = row.tokens
    return most


def _choose(bits: int) -> list[LookupTime]:
    if not use_lookup(bits, 0):
        return []
    product = NativeLinear(_any_weight(bits), None)
    draw = torch.Generator().manual_seed(0)
    times = []
    try:
        for n_tokens in TOKENS:
            x = torch.randn(n_tokens, _SHAPE[1], generator=draw)
            best = dict.fromkeys((0, _ANY_TOKENS), float("inf"))
            for _ in range(_REPETITIONS + 1):  # the first only warms up
                for limit in best:
                    use_lookup(bits, limit)
                    start = time.perf_counter()
                    product.forward(x)
                    best[limit] = min(best[limit], time.perf_counter() - start)
            times.append(
                LookupTime(
                    bits=bits, tokens=n_tokens, multiply_s=best[0], lookup_s=best[_ANY_TOKENS]
                )
            )
    finally:
        use_lookup(bits, chosen_tokens(tuple(times), bits))
    return times


def _any_weight(bits: int) -> IntegerWeight:
    n_out, n_in = _SHAPE
    draw = torch.Generator().manual_seed(bits)
    plane = torch.randint(
        0, 256, (plane_bytes(n_out, n_in, bits),), dtype=torch.uint8, generator=draw
    )
    return IntegerWeight(
        planes=(plane,),
        scales=torch.ones(n_row_blocks(n_out), n_in // _GROUP, ROWS, dtype=torch.float16),
        width_bits=bits,
        group=_GROUP,
        n_outputs=n_out,
        n_inputs=n_in,
    )
