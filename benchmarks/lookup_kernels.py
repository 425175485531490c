"""How fast products by table lookup are, against torch's products of 8 bits and our own kernels.

    python benchmarks/lookup_kernels.py [--threads 1,2] [--shape 4096x4096] [--tokens 1,4,17,32,128]
        [--repetitions 9] [--sections pairs,sums] [--out rows.jsonl]

What is compared runs in turn, in one process; figures are medians, ratios are of medians.

- pairs: two-bit weights x two-bit tokens, for the code books (-1 0 1 2) x (0 1 2 3) and
  (-3 -1 1 3) x (-3 -1 1 3), exactly; against `torch._int_mm` of the same numbers as int8 (it takes
  17 tokens at least), against torch's quantized linear (FBGEMM, which is made for such processors)
  and against our kernels' 8-bit weights and 2-bit weights with tokens of 8 bits. Where a processor
  has no int8 dot product, `_int_mm` is a plain loop: read its column with the next one.
- sums: 1- and 2-bit weights x 8-bit tokens, looked up and multiplied, to the last bit the same;
  one weight that stays in the caches, and enough copies to fill the last one four times.

GMAC/s are 10^9 multiplications with their additions per second, as done; GB/s of codes and scales.
"""

import argparse
import statistics
import warnings
from pathlib import Path

import torch
from interleaved import Call, time_in_turn
from machine import describe_machine
from random_weights import integer_bytes, integer_weight
from result_rows import RowFile, print_table, record_rows

from moe_tool.native.kernels import (
    NativeLinear,
    kernels_in_use,
    pair_product,
    set_threads,
    use_lookup,
)
from moe_tool.quantization.pair_lookup import pack_pair_tokens, pack_pair_weights, pair_tables
from moe_tool.quantization.weights import IntegerWeight

_BOOKS = {"0..3": ((-1, 0, 1, 2), (0, 1, 2, 3)), "+-1 +-3": ((-3, -1, 1, 3), (-3, -1, 1, 3))}
_LEAST_INT_MM = 17
_TARGET = 1.74


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=_numbers, default=(1, 2))
    parser.add_argument("--shape", default="4096x4096", help="outputs x inputs")
    parser.add_argument("--tokens", type=_numbers, default=(1, 4, 17, 32, 128))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--sections", default="pairs,sums")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    n_out, n_in = (int(part) for part in given.shape.split("x"))
    sections = given.sections.split(",")
    with record_rows(given.out, vars(given)) as rows:
        print(f"{kernels_in_use()} kernels, {n_out} x {n_in}\n")
        if "pairs" in sections:
            _pairs(given.threads, given.tokens, n_out, n_in, given.repetitions, rows)
        if "sums" in sections:
            _sums(given.threads, given.tokens, n_out, n_in, given.repetitions, rows)


def _pairs(
    threads: tuple[int, ...],
    tokens: tuple[int, ...],
    n_out: int,
    n_in: int,
    repetitions: int,
    rows: RowFile,
) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = torch.randint(0, 4, (n_out, n_in), dtype=torch.uint8, generator=draw)
    packed = pack_pair_weights(weights)
    quantized = _fbgemm_weight(n_out, n_in)
    linear = {
        bits: NativeLinear(integer_weight(n_out, n_in, bits, seed=0), None) for bits in (8, 2)
    }
    lines = []
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        set_threads(n_threads)
        for n in tokens:
            codes = torch.randint(0, 4, (n, n_in), dtype=torch.uint8, generator=draw)
            x = torch.randn(n, n_in, generator=draw)
            calls: dict[str, Call] = {}
            for name, (weight_values, token_values) in _BOOKS.items():
                weight_book, token_book = (
                    torch.tensor(values, dtype=torch.int8)
                    for values in (weight_values, token_values)
                )
                tables, pairs = pair_tables(weight_book, token_book), pack_pair_tokens(codes)
                calls[name] = lambda pairs=pairs, tables=tables: pair_product(packed, pairs, tables)
                if n >= _LEAST_INT_MM:
                    wide = token_book[codes.long()], weight_book[weights.long()].t()
                    if not torch.equal(calls[name](), torch._int_mm(*wide)):
                        raise AssertionError("the products differ")
            if n >= _LEAST_INT_MM:
                calls["_int_mm"] = lambda wide=wide: torch._int_mm(*wide)
            if quantized is not None:
                tokens_8 = torch.quantize_per_tensor(x, 0.02, 128, torch.quint8)
                calls["fbgemm"] = lambda t=tokens_8: torch.ops.quantized.linear(
                    t, quantized, 1.0, 0
                )
            for bits, product in linear.items():
                calls[f"ours, {bits} x 8"] = lambda product=product, x=x: product.forward(x)
            seconds = _medians(calls, repetitions)
            fastest, slowest = (
                min(seconds[name] for name in _BOOKS),
                max(seconds[name] for name in _BOOKS),
            )
            rate = n * n_out * n_in / 1e9
            cells = [str(n_threads), str(n)]
            cells += [
                f"{1e3 * seconds[name]:.2f} ms, {rate / seconds[name]:.0f}" for name in _BOOKS
            ]
            cells.append(f"{packed.codes.numel() / 1e9 / fastest:.2f}")
            for name in ("_int_mm", "fbgemm", "ours, 8 x 8", "ours, 2 x 8"):
                cells.append(
                    f"{1e3 * seconds[name]:.2f} ms, {seconds[name] / slowest:.2f} x"
                    if name in seconds
                    else "-"
                )
            met = seconds["_int_mm"] >= _TARGET * slowest if "_int_mm" in seconds else None
            cells.append("" if met is None else "yes" if met else "NO")
            lines.append(cells)
            rows.add("pairs", threads=n_threads, tokens=n, seconds=seconds)
    print("two bits x two bits: time and GMAC/s by code books; the others' time against the slower")
    print_table(
        [
            "threads", "tokens", *_BOOKS, "GB/s", "torch._int_mm", "torch quantized linear",
            "ours, 8 x 8 bits", "ours, 2 x 8 bits", f"_int_mm >= {_TARGET} x",
        ],
        lines,
    )  # fmt: skip
    print()


def _sums(
    threads: tuple[int, ...],
    tokens: tuple[int, ...],
    n_out: int,
    n_in: int,
    repetitions: int,
    rows: RowFile,
) -> None:
    lines = []
    for bits in (1, 2):
        size = integer_bytes(n_out, n_in, bits)
        many = 1 + 4 * describe_machine().last_level_cache_bytes // size
        products = [
            NativeLinear(_copy(integer_weight(n_out, n_in, bits, seed=0)), None)
            for _ in range(many)
        ]
        for copies in (1, many):
            for n_threads in threads:
                set_threads(n_threads)
                torch.set_num_threads(1)
                for n in tokens:
                    x = torch.randn(n, n_in, generator=torch.Generator().manual_seed(0))
                    ways = {"multiplied": 0, "looked up": n}
                    if not _are_same(products[0], x, bits):
                        raise AssertionError("the products differ")
                    calls = {
                        name: _turns(products[:copies], x, bits, limit)
                        for name, limit in ways.items()
                    }
                    seconds = _medians(calls, repetitions)
                    found, other = seconds["looked up"], seconds["multiplied"]
                    lines.append(
                        [
                            str(bits), "caches" if copies == 1 else "memory",
                            str(n_threads), str(n),
                            f"{1e3 * other:.3f}", f"{1e3 * found:.3f}", f"{other / found:.2f} x",
                            f"{n * n_out * n_in / 1e9 / found:.0f}", f"{size / 1e9 / found:.1f}",
                        ]
                    )  # fmt: skip
                    rows.add(
                        "sums",
                        bits=bits,
                        copies=copies,
                        threads=n_threads,
                        tokens=n,
                        seconds=seconds,
                    )
        use_lookup(bits, 0)
    print("1 and 2 bits x 8 bits, scales for 64 inputs; GMAC/s and GB/s of the lookup")
    print_table(
        [
            "bits", "from", "threads", "tokens", "multiplied, ms", "looked up, ms", "gain",
            "GMAC/s", "GB/s",
        ],
        lines,
    )  # fmt: skip
    print()


def _turns(products: list[NativeLinear], x: torch.Tensor, bits: int, limit: int) -> Call:
    """A call that takes the next weight each time."""
    at = [0]

    def call() -> None:
        use_lookup(bits, limit)
        at[0] = (at[0] + 1) % len(products)
        products[at[0]].forward(x)

    return call


def _are_same(product: NativeLinear, x: torch.Tensor, bits: int) -> bool:
    use_lookup(bits, 0)
    multiplied = product.forward(x)
    if not use_lookup(bits, x.shape[0]):
        raise SystemExit(f"{kernels_in_use()} kernels look no sums up")
    return torch.equal(product.forward(x), multiplied)


def _copy(weight: IntegerWeight) -> IntegerWeight:
    return IntegerWeight(
        planes=tuple(plane.clone() for plane in weight.planes),
        scales=weight.scales.clone(),
        width_bits=weight.width_bits,
        group=weight.group,
        n_outputs=weight.n_outputs,
        n_inputs=weight.n_inputs,
    )


def _fbgemm_weight(n_out: int, n_in: int) -> object:
    """A weight as torch's quantized linear takes it, None where there is no FBGEMM."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    torch.backends.quantized.engine = "fbgemm"
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor", category=UserWarning)
    weight = torch.quantize_per_tensor(torch.randn(n_out, n_in), 0.02, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(weight, None)


def _medians(calls: dict[str, Call], repetitions: int) -> dict[str, float]:
    seconds = time_in_turn(calls, repetitions=repetitions)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
