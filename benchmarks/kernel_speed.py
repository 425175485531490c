"""How fast products with one weight matrix are, against what memory gives and against torch.

    python benchmarks/kernel_speed.py [--threads 1,2] [--shape 14336x4096] [--bits 8,4,3,2,1]
        [--tokens 1,2,4,8,16,64,512] [--experts 4096x14336,2048x7168] [--repetitions 20]
        [--sections gemv,expert,gemm] [--out rows.jsonl]

Weights are random and rotate through enough copies to fill the last-level cache four times. What is
compared runs in turn, in one process, and figures are medians:

- gemv: one token; GB/s of codes and scales (or floats), as a share of what memory gives to the
  fastest of three ways of reading it with as many threads;
- expert: gate, up, activation and down at 4 bits, against torch's own 4-bit products, bfloat16
  activations, with gate and up in one matrix or in two, whichever is faster;
- gemm: several tokens at 4 bits, and float weights at the largest number of tokens against torch's
  float32 product.

MOE_TOOL_KERNELS forces an implementation, as everywhere.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from interleaved import Call, time_in_turn
from machine import describe_machine
from random_weights import (
    Rotation,
    TorchInt4,
    float_weight,
    integer_bytes,
    integer_weight,
    rotate,
    torch_int4,
)
from read_bandwidth import SIZE_BYTES, reading_calls
from result_rows import print_table, record_rows, spread_of

from moe_tool.experts.linear import linear
from moe_tool.native.kernels import Gate, NativeExpert, is_native, kernels_in_use, set_threads
from moe_tool.quantization.weights import FloatWeight, IntegerWeight

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TIME_TARGETS = {3: 1.2, 2: 1.2, 1: 1.5}
_GATE = Gate(activation="silu", gated=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every section needs."""

    n_threads: int
    repetitions: int
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table."""

    what: str
    seconds: list[float]
    rate: str = ""
    compared: str = ""
    target: str = ""
    met: bool | None = None

    def cells(self, n_threads: int) -> list[str]:
        """Return the text of its columns."""
        ms = spread_of([1e3 * value for value in self.seconds])
        met = "" if self.met is None else "yes" if self.met else "NO"
        return [str(n_threads), self.what, str(ms), self.rate, self.compared, self.target, met]


def gemv_lines(context: Context, shape: tuple[int, int], bits: tuple[int, ...]) -> list[Line]:
    """Return one token's products with weights of each width, and the reads beside them."""
    x = torch.randn(1, shape[1])
    calls = reading_calls(context.n_threads)
    sizes = dict.fromkeys(calls, SIZE_BYTES)
    reads = list(calls)
    for width in bits:
        name = f"gemv {width} bits"
        sizes[name] = integer_bytes(*shape, width)
        weights = _integers(context, shape, width)
        calls[name] = _linear_call(x, weights)
    for kind, dtype in _FLOATS.items():
        name = f"gemv {kind}"
        sizes[name] = shape[0] * shape[1] * dtype.itemsize
        calls[name] = _linear_call(x, _floats(context, shape, dtype))
    seconds = time_in_turn(calls, repetitions=context.repetitions)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: sizes[name] / middle[name] / 1e9 for name in calls}
    limit = max(rates[name] for name in (*reads, "gemv fp32"))
    lines = []
    for name in calls:
        share = rates[name] / limit
        width = int(name.split()[1]) if name.endswith("bits") else 0
        compared, target, met = f"{share:.0%} of {limit:.1f} GB/s", "", None
        if width == 4:
            target, met = ">= 85%", share >= 0.85
        elif width in _TIME_TARGETS and 4 in bits:
            four = "gemv 4 bits"
            ratio = middle[name] / (sizes[name] / sizes[four] * middle[four])
            compared += f"; {ratio:.2f} x its bytes' share of the 4-bit time"
            target, met = f"<= {_TIME_TARGETS[width]} x", ratio <= _TIME_TARGETS[width]
        lines.append(
            Line(
                what=name,
                seconds=seconds[name],
                rate=f"{rates[name]:.1f} GB/s",
                compared=compared,
                target=target,
                met=met,
            )
        )
    return lines


def expert_lines(context: Context, hidden: int, inner: int) -> list[Line]:
    """Return one token through a whole 4-bit expert, ours and torch's."""
    x = torch.randn(1, hidden)
    first = _integers(context, (2 * inner, hidden), 4)
    second = _integers(context, (hidden, inner), 4)
    theirs_up = _torch_int4s(context, (2 * inner, hidden))
    theirs_gate, theirs_up_alone = (_torch_int4s(context, (inner, hidden)) for _ in range(2))
    theirs_down = _torch_int4s(context, (hidden, inner))
    narrow = x.bfloat16()

    def pair() -> torch.Tensor:
        gate, up = theirs_up.next().product(narrow).chunk(2, dim=-1)
        return theirs_down.next().product(F.silu(gate) * up)

    def triple() -> torch.Tensor:
        gate = theirs_gate.next().product(narrow)
        up = theirs_up_alone.next().product(narrow)
        return theirs_down.next().product(F.silu(gate) * up)

    def ours() -> torch.Tensor:
        if is_native():
            return NativeExpert(first.next(), None, second.next(), None).forward(x, _GATE)
        gate, up = linear(x, first.next()).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, second.next())

    name = f"expert H={hidden} I={inner}"
    calls: dict[str, Call] = {
        f"{name} 4 bits": ours,
        f"{name} torch int4, pair": pair,
        f"{name} torch int4, triple": triple,
    }
    seconds = time_in_turn(calls, repetitions=context.repetitions)
    mine, *others = (statistics.median(values) for values in seconds.values())
    ratio = min(others) / mine
    n_bytes = integer_bytes(2 * inner, hidden, 4) + integer_bytes(hidden, inner, 4)
    own_name, *other_names = calls
    return [
        Line(
            what=own_name,
            seconds=seconds[own_name],
            rate=f"{n_bytes / mine / 1e9:.1f} GB/s",
            compared=f"{ratio:.2f} x as fast as torch's",
            target=">= 1.4 x",
            met=ratio >= 1.4,
        ),
        *(Line(what=other, seconds=seconds[other]) for other in other_names),
    ]


def gemm_lines(context: Context, shape: tuple[int, int], tokens: tuple[int, ...]) -> list[Line]:
    """Return products of several tokens at 4 bits, and of the most with floats."""
    most = max(tokens)
    x = torch.randn(most, shape[1])
    integers = _integers(context, shape, 4)
    calls = {f"gemm {n} tokens, 4 bits": _linear_call(x[:n], integers) for n in tokens}
    reference = f"gemm {most} tokens, torch fp32"
    plain = _floats(context, shape, torch.float32)
    calls[reference] = lambda: F.linear(x, plain.next().values)
    for kind, dtype in _FLOATS.items():
        weights = plain if kind == "fp32" else _floats(context, shape, dtype)
        calls[f"gemm {most} tokens, {kind}"] = _linear_call(x, weights)
    seconds = time_in_turn(calls, repetitions=context.repetitions)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    lines = []
    for name in calls:
        n_tokens = int(name.split()[1])
        products = n_tokens * shape[0] * shape[1] / middle[name] / 1e9
        compared, target, met = "", "", None
        if n_tokens == most and name != reference:
            ratio = middle[name] / middle[reference]
            compared = f"{ratio:.2f} x torch's fp32 time"
            if not name.endswith("bits"):
                target, met = "<= 1.3 x", ratio <= 1.3
        lines.append(
            Line(
                what=name,
                seconds=seconds[name],
                rate=f"{products:.0f} G multiply-adds/s",
                compared=compared,
                target=target,
                met=met,
            )
        )
    return lines


def _linear_call(x: torch.Tensor, weights: Rotation[IntegerWeight] | Rotation[FloatWeight]) -> Call:
    return lambda: linear(x, weights.next())


def _integers(context: Context, shape: tuple[int, int], width: int) -> Rotation[IntegerWeight]:
    return rotate(
        lambda seed: integer_weight(*shape, width, seed=seed),
        size_bytes=integer_bytes(*shape, width),
        cache_bytes=context.cache_bytes,
    )


def _floats(context: Context, shape: tuple[int, int], dtype: torch.dtype) -> Rotation[FloatWeight]:
    return rotate(
        lambda seed: float_weight(*shape, dtype, seed=seed),
        size_bytes=shape[0] * shape[1] * dtype.itemsize,
        cache_bytes=context.cache_bytes,
    )


def _torch_int4s(context: Context, shape: tuple[int, int]) -> Rotation[TorchInt4]:
    return rotate(
        lambda seed: torch_int4(*shape, seed=seed),
        size_bytes=shape[0] * shape[1] // 2,
        cache_bytes=context.cache_bytes,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _shape(text: str) -> tuple[int, int]:
    n_out, n_in = text.split("x")
    return int(n_out), int(n_in)


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(_shape(word) for word in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=_numbers, default=(1, 2))
    parser.add_argument("--shape", type=_shape, default=(14336, 4096), help="outputs x inputs")
    parser.add_argument("--bits", type=_numbers, default=(8, 4, 3, 2, 1))
    parser.add_argument("--tokens", type=_numbers, default=(1, 2, 4, 8, 16, 64, 512))
    parser.add_argument("--experts", type=_shapes, default=((4096, 14336), (2048, 7168)))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--sections", default="gemv,expert,gemm")
    parser.add_argument("--out", type=Path, help="append raw rows as JSON lines")
    return parser


@torch.inference_mode()
def main() -> None:
    """Measure section by section and print the table."""
    a = _parser().parse_args()
    sections: dict[str, Callable[[Context], list[Line]]] = {
        "gemv": lambda context: gemv_lines(context, a.shape, a.bits),
        "expert": lambda context: [
            line for expert in a.experts for line in expert_lines(context, *expert)
        ],
        "gemm": lambda context: gemm_lines(context, a.shape, a.tokens),
    }
    table = []
    with record_rows(a.out, vars(a)) as rows:
        cache_bytes = describe_machine().last_level_cache_bytes
        for n_threads in a.threads:
            torch.set_num_threads(n_threads)
            set_threads(n_threads)
            context = Context(
                n_threads=n_threads, repetitions=a.repetitions, cache_bytes=cache_bytes
            )
            for section in a.sections.split(","):
                for line in sections[section](context):
                    table.append(line.cells(n_threads))
                    rows.add(
                        section,
                        threads=n_threads,
                        kernels=kernels_in_use(),
                        shape=a.shape,
                        what=line.what,
                        seconds=line.seconds,
                        rate=line.rate,
                        compared=line.compared,
                        target=line.target,
                        met=line.met,
                    )
    print(f"kernels {kernels_in_use()}, {a.shape[0]} outputs x {a.shape[1]} inputs\n")
    print_table(("threads", "what", "ms", "rate", "compared", "target", "met"), table)


if __name__ == "__main__":
    main()
