"""Codes trained without a master copy (ECO), beside quantization-aware training that keeps one.

    python benchmarks/eco_versus_master.py MODEL --train news=FILE --select wiki=FILE
        --judge reviews=FILE [--bits 4] [--steps 250] [--rates 0.003,0.01,0.03] [--tokens 32768]
        [--judge-tokens 8192] [--optimizer sgd] [--out rows.jsonl]

All begin with the same codes, rounded to nearest, and are trained layer by layer towards the exact
hidden states as `tune weights` does it: same text, same batches, same steps, same first grid of
learning rates, which is lengthened for a method by a factor of 3.2 while its best rate lies at an
end. `master` keeps every weight in float32, rounds it at each step and gives it the gradient by
its code (straight-through), with the same momentum; it is written here, apart from the product's
optimizer. Each method's rate is the one of least KL on `--select`; what is reported is its KL,
perplexity and squared layer error on text that neither trained nor chose: KL(checkpoint || codes)
and perplexity on `--judge`, the relative squared error of each layer's experts on an eighth of
`--train` that is held out. Ratios are to `master`, with an interval of 95 % over sequences.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from quantized_model import Judge
from result_rows import RowFile, print_table, record_rows

from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.locate import LocatedModel, locate_model
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.packing.pack_options import parse_precision
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import AnyWeight
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import parse_sources
from moe_tool.tuning.expert_gradient import expert_pass, gradients
from moe_tool.tuning.paired_layers import PairedLayer, PairedModel
from moe_tool.tuning.tune_layer import (
    TunedExpert,
    begin_expert,
    layer_error,
    tune_layer,
    unpack_expert,
)
from moe_tool.tuning.tune_options import TuneOptions

METHODS = ("master", "ECO nearest", "ECO stochastic", "no feedback")
HEADINGS = (
    "bits",
    "method",
    "rate",
    "KL",
    "to master",
    "interval",
    "perplexity",
    "layer error^2",
    "to master",
)
_LEAST_ROWS = 32
"""Fewest routed tokens at which an expert is trained, as in the product"""
_BETAS = (0.9, 0.99)
_LENGTHENING = 10**0.5
_MOST_LENGTHENINGS = 5
"""Rates beyond the grid that a method may ask for"""

Packed = Mapping[tuple[int, int], Mapping[str, AnyWeight]]
"""(layer, expert) -> its tensors as a record holds them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Outcome of one training."""

    method: str
    rate: float
    packed: Packed
    layer_loss: float
    """Mean over layers of the squared relative error on held-out tokens"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name in ("train", "select", "judge"):
        parser.add_argument(f"--{name}", nargs="+", required=True)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rates", default="0.003,0.01,0.03")
    parser.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--judge-tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    located = locate_model(a.model, offline=True)
    opened = open_model(located)
    texts = {name: _text(located, opened, a, name) for name in ("train", "select", "judge")}
    judges = {
        name: Judge.of_ids(a.model, torch.from_numpy(texts[name].ids.astype(np.int64)))
        for name in ("select", "judge")
    }
    lines = []
    with opened.checkpoint, record_rows(a.out, vars(a)) as kept:
        for bits in a.bits.split(","):
            start = _rounded(opened, bits)
            found = [_train(located, opened, start, texts["train"], a, "RTN start", 0.0)]
            for method in a.methods.split(","):
                tried = _Search(a, kept, bits, method)
                found.append(
                    tried.best(
                        lambda rate, method=method, start=start: _train(
                            located, opened, start, texts["train"], a, method, rate
                        ),
                        lambda one: judges["select"].divergence(_plain(one.packed)),
                    )
                )
            lines += _judge(judges["judge"], bits, found, kept)
    print_table(HEADINGS, lines)


class _Search:
    """Looks for a method's learning rate, on the grid and, where the best lies at an end, past it.

    The same rule for every method, so that none is held back by where the grid happens to end.
    """

    def __init__(self, a: argparse.Namespace, kept: RowFile, bits: str, method: str) -> None:
        self._grid = sorted(map(float, a.rates.split(",")))
        self._kept, self._bits, self._method = kept, bits, method
        self._tried: dict[float, tuple[float, Trained]] = {}

    def best(
        self, train: Callable[[float], Trained], divergence: Callable[[Trained], float]
    ) -> Trained:
        """Return the training of least KL on the selecting text."""
        grid = list(self._grid)
        for _ in range(_MOST_LENGTHENINGS + 1):
            for rate in grid:
                if rate not in self._tried:
                    self._try(rate, train(rate), divergence)
            best = min(grid, key=lambda rate: self._tried[rate][0])
            if best == grid[0]:
                grid.insert(0, _next_rate(best, 1 / _LENGTHENING))
            elif best == grid[-1]:
                grid.append(_next_rate(best, _LENGTHENING))
            else:
                break
        return min(self._tried.values(), key=lambda each: each[0])[1]

    def _try(self, rate: float, one: Trained, divergence: Callable[[Trained], float]) -> None:
        kl = divergence(one)
        self._tried[rate] = kl, one
        self._kept.add(
            "tried",
            bits=self._bits,
            method=self._method,
            rate=rate,
            kl_select=kl,
            layer_loss=one.layer_loss,
        )
        print(
            self._bits,
            self._method,
            rate,
            f"select KL {kl:.5f}, layers {one.layer_loss:.5f}",
            flush=True,
        )


def _next_rate(rate: float, factor: float) -> float:
    return float(f"{rate * factor:.1g}")


def _text(
    located: LocatedModel, opened: OpenedModel, a: argparse.Namespace, name: str
) -> TokenSequences:
    is_train = name == "train"
    return build_sequences(
        parse_sources(getattr(a, name)),
        load_tokenizer(located.folder),
        vocabulary=opened.shape.vocabulary,
        n_tokens=a.tokens if is_train else a.judge_tokens,
        seq_len=a.seq_len,
        holdout=0.125 if is_train else 0.0,
        seed=0,
        offline=True,
    )


def _rounded(opened: OpenedModel, bits: str) -> Packed:
    """Return all experts, rounded to nearest."""
    precision = parse_precision("--bits", bits)
    quantize = QUANTIZERS["rtn"].make(None)
    shape = opened.shape
    return {
        (layer, expert): quantize(opened.experts.read(layer, expert), precision)
        for layer in shape.layers
        for expert in range(shape.experts)
    }


def _plain(packed: Packed) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    return {
        key: {name: dequantize(weight) for name, weight in weights.items()}
        for key, weights in packed.items()
    }


def _train(
    located: LocatedModel,
    opened: OpenedModel,
    start: Packed,
    text: TokenSequences,
    a: argparse.Namespace,
    method: str,
    rate: float,
) -> Trained:
    """Train all layers one after the other, each behind the trained ones before it."""
    ids = torch.from_numpy(text.ids.astype(np.int64))
    paired = PairedModel(located.folder, opened, ids, torch.from_numpy(text.held_out))
    packed: dict[tuple[int, int], Mapping[str, AnyWeight]] = {}
    errors = []
    for layer in paired.layers(last=max(opened.shape.layers)):
        experts = {
            expert: unpack_expert(start[layer.layer, expert])
            for expert in range(opened.shape.experts)
        }
        if method != "RTN start":
            _train_layer(opened, layer, experts, _options(a, method, rate), method)
        judged = torch.nonzero(layer.held_out).flatten()
        errors.append(layer_error(layer.module, experts, layer.text, judged) ** 2)
        own = {expert: each.packed() for expert, each in experts.items()}
        packed |= {(layer.layer, expert): each for expert, each in own.items()}
        paired.go_on_with(own)
    return Trained(method=method, rate=rate, packed=packed, layer_loss=float(np.mean(errors)))


def _options(a: argparse.Namespace, method: str, rate: float) -> TuneOptions:
    return TuneOptions(
        steps=a.steps,
        batch=a.batch,
        optimizer=a.optimizer,
        rounding="stochastic" if method == "ECO stochastic" else "nearest",
        feedback="none" if method == "no feedback" else "momentum",
        rate=rate,
    )


def _train_layer(
    opened: OpenedModel,
    layer: PairedLayer,
    experts: dict[int, TunedExpert],
    options: TuneOptions,
    method: str,
) -> None:
    rows = torch.nonzero(~layer.held_out).flatten()
    wanted = torch.bincount(layer.text.index[rows].flatten(), minlength=len(experts))
    moving = [expert for expert in experts if int(wanted[expert]) >= _LEAST_ROWS]
    exact = {expert: opened.experts.read(layer.layer, expert) for expert in moving}
    if method == "master":
        masters = {expert: _Master(experts[expert], exact[expert], options) for expert in moving}
        _train_masters(layer, experts, masters, rows, options, seed=layer.layer)
        return
    for expert in moving:
        begin_expert(experts[expert], exact[expert], options)
    tune_layer(
        layer.module, experts, layer.text, rows, options, seed=layer.layer, on_step=lambda: None
    )


class _Master:
    """Float weights of one expert, in steps of its grids, and the moments of their gradients."""

    def __init__(
        self, expert: TunedExpert, exact: Mapping[str, torch.Tensor], options: TuneOptions
    ) -> None:
        self._expert, self._options, self._step = expert, options, 0
        self._weights, self._most = {}, {}
        for name, matrix in expert.matrices.items():
            weight = matrix.stored
            wide = [
                each.repeat_interleave(weight.group, dim=1)[:, : weight.n_inputs]
                for each in (matrix.slope, matrix.start)
            ]
            place = (exact[name].float() - wide[1]) / wide[0]
            self._weights[name] = torch.where(wide[0] == 0, matrix.codes.float(), place)
            self._most[name] = 2**weight.width_bits - 1
        self._first = {name: torch.zeros_like(each) for name, each in self._weights.items()}
        self._second = {name: torch.zeros_like(each) for name, each in self._weights.items()}
        self._units: dict[str, float] = {}

    def advance(self, found: Mapping[str, torch.Tensor], rate: float) -> None:
        """Move the weights against their gradients, and round them to codes."""
        self._step += 1
        for name, by_codes in found.items():
            unit = self._units.setdefault(name, float(by_codes.square().mean().sqrt()) or 1.0)
            gradient = by_codes / unit
            one, two = _BETAS
            first = self._first[name].mul_(one).add_(gradient, alpha=1 - one)
            change = first
            if self._options.optimizer == "adam":
                second = self._second[name].mul_(two).addcmul_(gradient, gradient, value=1 - two)
                spread = (second / (1 - two**self._step)).sqrt() + 1e-8
                change = first / (1 - one**self._step) / spread
            most = self._most[name]
            weight = self._weights[name].sub_(change, alpha=rate).clamp_(-0.5, most + 0.5)
            codes = weight.round().clamp(0, most).to(torch.uint8)
            self._expert.matrices[name] = replace(self._expert.matrices[name], codes=codes)


def _train_masters(
    layer: PairedLayer,
    experts: Mapping[int, TunedExpert],
    masters: Mapping[int, _Master],
    rows: torch.Tensor,
    options: TuneOptions,
    *,
    seed: int,
) -> None:
    """Train as `tune_layer` does, on the same batches, with master weights."""
    draw = torch.Generator().manual_seed(seed)
    queue = rows[:0]
    for step in range(options.steps):
        if len(queue) < options.batch:
            queue = torch.cat([queue, rows[torch.randperm(len(rows), generator=draw)]])
        text, queue = layer.text.rows(queue[: options.batch]), queue[options.batch :]
        error = -text.target
        passes = {}
        for expert, each in experts.items():
            token, slot = torch.nonzero(text.index == expert, as_tuple=True)
            if len(token):
                gate = text.weight[token, slot, None]
                names = (*each.matrices, *each.floats)
                done = expert_pass(layer.module, names, each.values, text.inputs[token])
                error.index_add_(0, token, done.output.detach() * gate)
                passes[expert] = token, gate, done
        error.mul_(2 / len(text.inputs))
        for expert, (token, gate, done) in passes.items():
            if expert in masters:
                matrices = experts[expert].matrices
                found = gradients(layer.module, matrices, done, error[token] * gate)
                masters[expert].advance(found, options.rate_at(step))


def _judge(judge: Judge, bits: str, found: list[Trained], kept: RowFile) -> list[list[str]]:
    losses = {
        one.method: [each.numpy() for each in judge.losses(_plain(one.packed))] for one in found
    }
    master = next(one for one in found if one.method == "master")
    lines = []
    for one in found:
        kl, nll = losses[one.method]
        both = np.stack([kl, losses["master"][0]], axis=1)  # [N, 2]
        interval = bootstrap_interval(
            both, lambda r: r[:, :, 0].mean(axis=1) / r[:, :, 1].mean(axis=1), seed=0
        )
        low, high = interval or (np.nan, np.nan)
        ratio = kl.mean() / losses["master"][0].mean()
        of_layers = one.layer_loss / master.layer_loss
        kept.add(
            "judged",
            bits=bits,
            method=one.method,
            rate=one.rate,
            kl=float(kl.mean()),
            to_master=float(ratio),
            interval=(low, high),
            perplexity=float(np.exp(nll.mean())),
            layer_loss=one.layer_loss,
            layers_to_master=of_layers,
        )
        lines.append(
            [
                bits,
                one.method,
                f"{one.rate:g}",
                f"{kl.mean():.5f}",
                f"{ratio:.3f}",
                f"{low:.3f}-{high:.3f}",
                f"{np.exp(nll.mean()):.3f}",
                f"{one.layer_loss:.5f}",
                f"{of_layers:.3f}",
            ]
        )
        print(" ".join(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    main()
