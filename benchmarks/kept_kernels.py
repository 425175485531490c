"""How fast products with kept codes are, byte for byte beside those with our 4-bit codes.

    python benchmarks/kept_kernels.py [--threads 1,2] [--shape 2880x2880,2048x7168]
        [--repetitions 20] [--out rows.jsonl]

One token; weights are random and rotate through enough copies to fill the last-level cache four
times. All products run in turn, in one process; figures are medians of GB/s of codes, scales and
zeros, each beside the 4-bit kernel of the same turn.
"""

import argparse
import statistics
from functools import cache, partial
from pathlib import Path

import torch
from interleaved import Call, time_in_turn
from machine import describe_machine
from random_weights import Rotation, integer_bytes, integer_weight, rotate
from result_rows import print_table, record_rows

from moe_tool.native.kernels import NativeLinear, kernels_in_use, round_tokens, set_threads
from moe_tool.quantization.kept_codes import CODE_BITS, CodeKind, KeptWeight

_FORMATS: dict[str, tuple[CodeKind, tuple[int, int], torch.dtype, bool]] = {
    "mxfp4": ("e2m1", (1, 32), torch.uint8, False),
    "nvfp4": ("e2m1", (1, 16), torch.float8_e4m3fn, False),
    "fp8 128x128": ("e4m3", (128, 128), torch.float32, False),
    "int4 g128 zeros": ("int4", (1, 128), torch.float16, True),
    "int4 g32": ("int4", (1, 32), torch.bfloat16, False),
    "int8 rows": ("int8", (1, 2**20), torch.bfloat16, False),
}
_OURS = "ours 4 bits"
_TARGETS = {"float32": 0.6, "int8": 0.8}


def kept_weight(name: str, n_out: int, n_in: int, *, seed: int) -> KeptWeight:
    """Return random codes with small scales."""
    kind, group, scale, has_zeros = _FORMATS[name]
    draw = torch.Generator().manual_seed(seed)
    shape = (n_out, n_in * CODE_BITS[kind] // 8)
    grid = (-(-n_out // group[0]), -(-n_in // group[1]))
    numbers = torch.rand(grid, generator=draw)
    exponents = torch.randint(110, 120, grid, generator=draw, dtype=torch.uint8)
    return KeptWeight(
        codes=torch.randint(0, 126, shape, generator=draw, dtype=torch.uint8),
        kind=kind,
        scale=exponents if scale == torch.uint8 else numbers.to(scale),
        group=group,
        zero=torch.randint(0, 16, grid, generator=draw, dtype=torch.uint8) if has_zeros else None,
    )


def kept_bytes(weight: KeptWeight) -> int:
    """Return what one product reads of a weight."""
    parts = (weight.codes, weight.scale, weight.zero)
    return sum(part.nbytes for part in parts if part is not None)


def calls_of(
    shape: tuple[int, int], x: torch.Tensor, cache_bytes: int
) -> tuple[dict[str, Call], dict[str, int]]:
    """Return the products by name, and the bytes that each reads."""
    sizes = {_OURS: integer_bytes(*shape, 4)}
    ours = rotate(
        lambda seed: NativeLinear(integer_weight(*shape, 4, seed=seed), None),
        size_bytes=sizes[_OURS],
        cache_bytes=cache_bytes,
    )
    calls: dict[str, Call] = {_OURS: lambda: ours.next().forward(x)}
    for name, form in _FORMATS.items():
        size = kept_bytes(kept_weight(name, *shape, seed=0))
        copy = cache(partial(kept_weight, name, *shape))
        for tokens in ("float32", "int8") if form[0] != "e4m3" else ("float32",):
            round_tokens(tokens == "int8")
            turns = rotate(
                lambda seed, copy=copy: NativeLinear(copy(seed=seed), None),
                size_bytes=size,
                cache_bytes=cache_bytes,
            )
            sizes[f"{name}, {tokens}"] = size
            calls[f"{name}, {tokens}"] = partial(_multiply, turns, x)
    round_tokens(False)
    return calls, sizes


def _multiply(turns: Rotation[NativeLinear], x: torch.Tensor) -> torch.Tensor:
    return turns.next().forward(x)


def lines(shape: tuple[int, int], repetitions: int, cache_bytes: int) -> list[list[str]]:
    """Return the table's lines for one shape."""
    calls, sizes = calls_of(shape, torch.randn(1, shape[1]), cache_bytes)
    seconds = time_in_turn(calls, repetitions=repetitions)
    found = []
    for name in calls:
        rates = [sizes[name] / each / 1e9 for each in seconds[name]]
        beside = [sizes[_OURS] / each / 1e9 for each in seconds[_OURS]]
        share = statistics.median(a / b for a, b in zip(rates, beside, strict=True))
        target = _TARGETS.get(name.rpartition(", ")[2])
        met = "" if target is None else "yes" if share >= target else "NO"
        wanted = "" if target is None else f">= {target}"
        found.append([name, f"{statistics.median(rates):.1f}", f"{share:.2f}", wanted, met])
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shape", default="2880x2880,2048x7168")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    table = []
    with record_rows(a.out, vars(a)) as rows:
        cache_bytes = describe_machine().last_level_cache_bytes
        for text in a.shape.split(","):
            n_out, n_in = map(int, text.split("x"))
            for n_threads in map(int, a.threads.split(",")):
                set_threads(n_threads)
                for line in lines((n_out, n_in), a.repetitions, cache_bytes):
                    table.append([text, str(n_threads), *line])
                    rows.add("kept", shape=text, threads=n_threads, line=line)
    print(f"kernels {kernels_in_use()}\n")
    print_table(("shape", "threads", "product", "GB/s", "of ours", "target", "met"), table)


if __name__ == "__main__":
    main()
