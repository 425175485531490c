"""Ways to hand bits out to experts, and one number of bits for all, by measured divergence.

    python benchmarks/bit_allocation.py MODEL PROFILE --text FILE [--quantizer gptq]
        [--average 1.6,2.0,2.5,3.0] [--tokens 4096] [--seq-len 256] [--prices FILE]
        [--out rows.jsonl]

Every expert is quantized once at 1, 2, 3 and 4 bits in one pass over the model, and its price
measured on held-out tokens of the profile as `plan --average-bits` does; then each allocation is
put together and KL(checkpoint || it) is taken over the text. Products are torch's in float32: what
is compared are weights, not kernels. The model has to fit into memory for this.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from result_rows import print_table, record_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.formats.expert_form import full_form
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import locate_model
from moe_tool.packing.calibrated_layers import CalibratedModel
from moe_tool.packing.measure_bit_prices import MEASURED_WIDTHS, measure_bit_prices
from moe_tool.packing.own_forms import parse_precision
from moe_tool.packing.quantizers import calibrated
from moe_tool.planning.allocate_bits import WIDTHS, allocate_by_layer
from moe_tool.planning.bit_costs import bit_costs
from moe_tool.planning.mixed_allocations import allocate_average, control_allocations
from moe_tool.planning.plan_sources import PlanSources, read_sources
from moe_tool.quantization.round_to_nearest import dequantize

HEADINGS = ("average", "allocation", "expected KL", "KL", "to uniform", "MiB of experts")


def quantized(a: argparse.Namespace) -> dict[tuple[int, int, int], dict[str, torch.Tensor]]:
    """Return (layer, expert, width) -> its matrices, bfloat16."""
    model = locate_model(a.model, offline=True)
    opened = open_model(model)
    found = {}
    forms = {
        width: full_form(opened.shape, parse_precision("--bits", str(width), a.quantizer))
        for width in MEASURED_WIDTHS
    }
    with opened.checkpoint, ProfileReader.open(a.profile) as profile, torch.no_grad():
        for layer in CalibratedModel(model.folder, opened, profile.tokens).layers():
            for expert in range(opened.shape.experts):
                sample = layer.sample(expert, most_measured=1)
                quantize_expert = calibrated(a.quantizer, sample)
                for width, form in forms.items():
                    made = quantize_expert(sample.tensors, form.precision)
                    found[layer.layer, expert, width] = {
                        name: dequantize(weight).bfloat16() for name, weight in made.items()
                    }
    return found


def published_costs(sources: PlanSources, eps: np.ndarray) -> np.ndarray:
    """Return what Mixture Compressor adds up, [L, E, W]: frequency times mean gate weight times
    squared error, each layer's shares adding up to 1.

    Args:
        sources: of the profile.
        eps: [L, E, W] relative errors.
    """
    found = np.zeros(eps.shape)
    for at, layer in enumerate(sources.profile.header.shape.layers):
        counts = sources.statistics[layer].in_sample
        frequency = counts.load / max(1, counts.load.sum())
        gate = counts.gate_sum / np.maximum(1, counts.load)
        found[at] = (frequency * gate / max(1e-12, gate.sum()))[:, None] * eps[at] ** 2
    return found


class Judge:
    """The checkpoint, whole, and its answers to a text."""

    def __init__(self, a: argparse.Namespace) -> None:
        folder = locate_model(a.model, offline=True).folder
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = a.text.read_text(encoding="utf-8")[: 8 * a.tokens]
        ids = tokenizer(text)["input_ids"][: a.tokens]
        self._ids = torch.tensor(ids[: len(ids) // a.seq_len * a.seq_len]).view(-1, a.seq_len)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._experts = {at: layer.mlp.experts for at, layer in enumerate(self._model.model.layers)}
        self._whole = {
            (at, name): getattr(module, name).detach().clone()
            for at, module in self._experts.items()
            for name in ("gate_up_proj", "down_proj")
        }
        self._truth = self._answers()

    def divergence(self, instead: dict[tuple[int, int], dict[str, torch.Tensor]]) -> float:
        """Return the mean KL with some experts' matrices replaced."""
        with torch.no_grad():
            for (at, name), whole in self._whole.items():
                weight = getattr(self._experts[at], name)
                weight.copy_(whole)
                for expert in range(len(weight)):
                    if (at, expert) in instead:
                        weight[expert] = instead[at, expert][name].float()
        found = self._answers()
        return float((self._truth.exp() * (self._truth - found)).sum(-1).mean())

    @torch.inference_mode()
    def _answers(self) -> torch.Tensor:
        parts = [self._model(row[None]).logits[0] for row in self._ids]
        return torch.log_softmax(torch.cat(parts), dim=-1)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("profile", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--quantizer", default="gptq", choices=["fitted", "gptq"])
    parser.add_argument("--average", default="1.6,2.0,2.5,3.0")
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
    eps = np.ones((*costs.load.shape, len(WIDTHS)))
    for at, entry in enumerate(prices.layers):
        for width, row in zip(prices.widths, entry.eps, strict=True):
            eps[at, :, WIDTHS.index(width)] = row
        eps[at, :, WIDTHS.index(8) :] = 0
    published = published_costs(sources, eps)
    weights = quantized(a)
    judge = Judge(a)
    allowed = [WIDTHS.index(width) for width in (0, *MEASURED_WIDTHS)]
    rows: list[dict[str, str | float]] = []
    for average in map(float, a.average.split(",")):
        size = np.broadcast_to(np.array(WIDTHS, dtype=np.int64), costs.nats.shape)
        room = int(average * costs.load.shape[1] + 1e-9) * len(layers)
        ways = {"over all layers": allocate_average(costs, average)}
        by_published = allocate_by_layer(published, size, room)
        assert by_published is not None
        ways |= {"as published": by_published, **control_allocations(costs, average)}
        measured = {}
        for name, chosen in ways.items():
            assert np.isin(chosen, allowed).all(), "more than 4 bits: not measured here"
            instead = {}
            for at, layer in enumerate(layers):
                for expert, column in enumerate(chosen[at]):
                    if (width := WIDTHS[column]) == 0:
                        zeros = weights[layer, expert, 1]
                        instead[layer, expert] = {k: torch.zeros_like(v) for k, v in zeros.items()}
                    else:
                        instead[layer, expert] = weights[layer, expert, width]
            measured[name] = judge.divergence(instead)
        for name, chosen in ways.items():
            nats = float(np.take_along_axis(costs.nats, chosen[..., None], axis=2).sum())
            rows.append(
                {
                    "average": average,
                    "allocation": name,
                    "expected KL": nats,
                    "KL": measured[name],
                    "to uniform": measured[name] / measured["uniform"],
                    "MiB of experts": float(costs.size_bytes[chosen].sum() / 2**20),
                }
            )
    return rows


if __name__ == "__main__":
    main()
