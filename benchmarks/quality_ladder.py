"""Divergence against the bytes of the experts: every quantizer, every width, and the allocations of
`plan` over them; a table and a plot.

    python benchmarks/quality_ladder.py MODEL PROFILE --text FILE [--tokens 4096] [--seq-len 256]
        [--plot ladder.png] [--out rows.jsonl]

Bytes are those of the records that `pack` writes, scales and alignment included. A row is on the
frontier where no other row has less divergence in as many bytes. `mixed` is what `plan
--average-bits` hands out with that quantizer; it should be the frontier wherever experts have
fewer than 4 bits. The model has to fit into memory for this.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from quantized_model import Judge, quantized
from result_rows import print_table, record_rows

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.formats.record_form import record_form
from moe_tool.models.locate import locate_model
from moe_tool.packing.measure_bit_prices import measure_bit_prices
from moe_tool.packing.pack_options import parse_precision
from moe_tool.packing.primary_forms import made_by
from moe_tool.planning.bit_costs import bit_costs
from moe_tool.planning.mixed_allocations import allocate_average
from moe_tool.planning.plan_sources import read_sources
from moe_tool.quantizers.registry import QUANTIZERS

HEADINGS = ("method", "bits", "MiB of experts", "of native", "KL", "expected KL", "frontier")
UNIFORM = ("1", "2:128", "2", "2:32", "3:128", "3", "4", "8")
NESTED = ("2+1", "2+2")
AVERAGES = (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
Row = dict[str, str | float]


def record_bytes(shape: MoeShape, bits: str, quantizer: Quantizer) -> int:
    """Return what one expert's record takes at these bits, as `quantized` names them."""
    name = bits.removeprefix("base of ")
    precision = made_by(quantizer, parse_precision("--bits", name))
    if name != bits:
        return record_form(shape, precision.base, "base").layout.size_bytes
    return record_form(shape, precision).layout.size_bytes


def rows_of(a: argparse.Namespace) -> Iterator[Row]:
    """Measure one method after the other."""
    judge = Judge(a.model, a.text, n_tokens=a.tokens, seq_len=a.seq_len)
    with ProfileReader.open(a.profile) as profile:
        shape, sources = profile.header.shape, read_sources(profile)
        keys = [(layer, expert) for layer in shape.layers for expert in range(shape.experts)]
        native = record_bytes(shape, "native", "rtn") * len(keys)
        yield _row("native", "16", native, native, 0.0)
        for quantizer in a.quantizers.split(","):
            spec = QUANTIZERS[quantizer]
            nested = NESTED if spec.can_nest else ()
            weights = quantized(a.model, a.profile, quantizer, (*UNIFORM, *nested))
            for bits in (*UNIFORM, *nested, *(f"base of {each}" for each in nested)):
                kl = judge.divergence({key: weights[*key, bits] for key in keys})
                size = record_bytes(shape, bits, quantizer) * len(keys)
                yield _row(quantizer, bits, size, native, kl)
            if spec.makes_zeros:
                continue
            prices = None
            if not spec.is_profiled:
                prices = measure_bit_prices(locate_model(a.model), profile, quantizer)
            costs = bit_costs(sources, prices)
            for average in AVERAGES:
                chosen = allocate_average(costs, average)
                instead = {}
                for at, layer in enumerate(shape.layers):
                    for expert, column in enumerate(chosen[at]):
                        if (width := costs.widths[column]) == 0:
                            like = weights[layer, expert, "1"]
                            instead[layer, expert] = {
                                name: torch.zeros_like(value) for name, value in like.items()
                            }
                        elif width < 16:
                            instead[layer, expert] = weights[layer, expert, str(width)]
                kl = judge.divergence(instead)
                nats = sum(
                    float(costs.nats[at, expert, column])
                    for at in range(len(chosen))
                    for expert, column in enumerate(chosen[at])
                )
                size = float(costs.size_bytes[chosen].sum())
                yield _row(f"mixed {quantizer}", f"{average:g}", size, native, kl, nats)


def _row(
    method: str, bits: str, size: float, native: float, kl: float, nats: float | None = None
) -> Row:
    return {
        "method": method,
        "bits": bits,
        "MiB of experts": size / 2**20,
        "of native": size / native,
        "KL": kl,
        "expected KL": "" if nats is None else nats,
    }


def mark_frontier(rows: list[Row]) -> None:
    """Say of every row whether another one has less divergence in no more bytes."""
    for row in rows:
        size, kl = float(row["MiB of experts"]), float(row["KL"])
        better = [
            each
            for each in rows
            if float(each["MiB of experts"]) <= size * (1 + 1e-6) and float(each["KL"]) < kl
        ]
        row["frontier"] = "" if better else "*"


def plot(rows: list[Row], path: Path) -> None:
    """Draw one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        bits = str(row["bits"])
        kind = " base" if bits.startswith("base") else " nested" if "+" in bits else ""
        lines.setdefault(f"{row['method']}{kind}", []).append(row)
    for name, line in lines.items():
        points = sorted((float(r["MiB of experts"]), float(r["KL"])) for r in line if r["KL"])
        if points:
            style = "-o" if name.startswith("mixed") else "--."
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MiB of expert records")
    axes.set_ylabel("KL(checkpoint || quantized), nats per token")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("profile", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--quantizers", default=",".join(QUANTIZERS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows: list[Row] = []
    with record_rows(a.out, vars(a)) as kept:
        for row in rows_of(a):
            rows.append(row)
            kept.add("ladder", **row)
    mark_frontier(rows)
    rows.sort(key=lambda row: -float(row["MiB of experts"]))
    print_table(HEADINGS, [[_cell(row[name]) for name in HEADINGS] for row in rows])
    if a.plot:
        plot(rows, a.plot)


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    main()
