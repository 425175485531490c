"""Ways to hand bits out to experts, and one number of bits for all, by measured divergence.

    python benchmarks/bit_allocation.py MODEL PROFILE --text SOURCE [--quantizer gptq]
        [--average 1.57,2.05,2.54] [--tokens 4096] [--seq-len 256] [--prices FILE]
        [--out rows.jsonl]

Every expert is quantized once at 1, 2, 3, 4 and 8 bits in one pass over the model, and its price
measured on held-out tokens of the profile as `plan --average-bits` does; then each allocation is
put together and KL(checkpoint || it) is taken over the text. "as published" is Mixture Compressor's
program (`plan --cost published`), whose averages count 4-bit matrices beside the experts; here an
average is of experts, the nearest that is a whole number of bits per layer, for all ways alike.
`mc` is GPTQ with the paper's one-bit scale. "over published" is the mean difference of KL per
sequence, with half a 95 % interval. Products are torch's in float32: what
is compared are weights, not kernels. The model has to fit into memory for this.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from quantized_model import Judge, quantized
from result_rows import print_table, record_rows
from text_tasks import token_stream

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.precision import NATIVE_WIDTH
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import locate_model
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.packing.measure_bit_prices import measure_bit_prices
from moe_tool.planning.bit_costs import bit_costs
from moe_tool.planning.mixed_allocations import allocate_average, control_allocations
from moe_tool.planning.plan_sources import read_sources
from moe_tool.planning.published_bits import (
    PublishedCost,
    allocate_published,
    nearest_average,
    published_costs,
)
from moe_tool.text.sources import parse_sources

HEADINGS = (
    *("average", "allocation", "expected KL", "KL", "to uniform", "over published", "+-"),
    "MiB of experts",
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("profile", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--quantizer", default="gptq", choices=["fitted", "gptq", "mc"])
    parser.add_argument("--average", default="1.57,2.05,2.54")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--prices", type=Path, help="bit prices that `plan` kept")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with record_rows(a.out, vars(a)) as kept:
        rows = _compare(a)
        for row in rows:
            kept.add("allocation", **row)
    print_table(HEADINGS, [[_cell(row[name]) for name in HEADINGS] for row in rows])


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _compare(a: argparse.Namespace) -> list[dict[str, str | float]]:
    with ProfileReader.open(a.profile) as profile:
        if a.prices:
            prices = read_json_artifact(a.prices, BitPrices)
        else:
            prices = measure_bit_prices(locate_model(a.model), profile, a.quantizer)
        sources = read_sources(profile)
    costs = bit_costs(sources, prices)
    layers = sources.profile.header.shape.layers
    published = published_costs(sources, prices, PublishedCost())
    coded = [width for width in costs.widths if 0 < width < NATIVE_WIDTH]
    weights = quantized(a.model, a.profile, a.quantizer, map(str, coded))
    folder = locate_model(a.model).folder
    source, n_sequences = parse_sources([a.text])[0], a.tokens // a.seq_len
    ids = token_stream(load_tokenizer(folder), source, 8 * a.tokens, seed=0)
    judged = torch.from_numpy(ids[: n_sequences * a.seq_len]).view(-1, a.seq_len)
    judge = Judge.of_ids(a.model, judged)
    rows: list[dict[str, str | float]] = []
    for asked in map(float, a.average.split(",")):
        average = nearest_average(costs.load.shape[1], asked)
        ways = {
            "over all layers": allocate_average(costs, average),
            "as published": allocate_published(costs, published, average),
            **control_allocations(costs, average),
        }
        measured = {}
        for name, chosen in ways.items():
            instead = {}
            for at, layer in enumerate(layers):
                for expert, column in enumerate(chosen[at]):
                    if (width := costs.widths[column]) == NATIVE_WIDTH:
                        continue  # the checkpoint's own
                    if width == 0:
                        zeros = weights[layer, expert, "1"]
                        instead[layer, expert] = {k: torch.zeros_like(v) for k, v in zeros.items()}
                    else:
                        instead[layer, expert] = weights[layer, expert, str(width)]
            measured[name] = judge.divergences(instead)
        for name, chosen in ways.items():
            nats = float(np.take_along_axis(costs.nats, chosen[..., None], axis=2).sum())
            over = measured[name] - measured["as published"]  # [N]
            rows.append(
                {
                    "average": average,
                    "allocation": name,
                    "expected KL": nats,
                    "KL": float(measured[name].mean()),
                    "to uniform": float(measured[name].mean() / measured["uniform"].mean()),
                    "over published": float(over.mean()),
                    "+-": float(1.96 * over.std() / len(over) ** 0.5),
                    "MiB of experts": float(costs.size_bytes[chosen].sum() / 2**20),
                }
            )
    return rows


if __name__ == "__main__":
    main()
