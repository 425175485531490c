"""A table of mean expert outputs per token id as the answer to a miss, beside other answers.

    python benchmarks/residual_table.py MODEL --train FILE [FILE ...] --judge FILE [FILE ...]
        [--train-tokens 200000] [--judge-tokens 8192] [--share 0.5] [--out rows.jsonl]

The hottest experts of each layer are in memory, whole; nothing is read. A missed slot of gate
weight g gets g times: nothing; the missed experts' mean output; the expert's own mean; a row by
token id of the table of rank 8, 32 or full (fitted over the missed slots of the training text by
least squares, so weighted by g^2); the expert's mean plus a row; a rank-16 map of the expert; its
2-bit form. Behind each table stand others of no more bytes: maps of all missed experts, of the rank
that fits, then rank-16 maps, 2-bit forms and whole experts of as many of the most used of them as
fit, with nothing for the others. Then whole layers: their routed output
left out, or a row in its place. KL is from the whole model on the judged text, with 95 % intervals
over sequences; "explained" is the share of the missed slots' energy. Products are float32.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from result_rows import RowFile, print_table, record_rows
from token_tables import TokenSums, table_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_tool.budget.sizes import format_bytes
from moe_tool.models.locate import locate_model
from moe_tool.quantization.low_rank import LinearFit, linear_fit, low_rank_map
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantizers.imatrix import quantize_imatrix

HEADINGS = ("answers", "bytes", "explained", "KL", "95 %")
RANKS: tuple[int | None, ...] = (8, 32, None)
_MAP_RANK, _BITS, _GROUP = 16, 2, 64
_SEQ_LEN, _BATCH = 256, 8
_MOST_SAMPLES = 2048
Answer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function from inputs [n, d] and token ids [n] to an expert's outputs [n, d]"""
At = tuple[int, int]
"""Layer and expert"""


@dataclass(slots=True)
class Plan:
    """Who answers: experts without an answer are left out."""

    missing: Mapping[int, list[int]] = field(default_factory=dict)
    answers: Mapping[At, Answer] = field(default_factory=dict)
    rows: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Layers whose routed output is a row by token id, [V, d]"""


class Probed:
    """A whole model whose experts can be watched and replaced."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.experts = [layer.mlp.experts for layer in self._model.model.layers]
        self.vocabulary = int(self._model.config.vocab_size)
        self.width = int(self._model.config.hidden_size)
        self.plan = Plan()
        self.watch: Callable[..., None] | None = None
        self._ids = torch.zeros(0, dtype=torch.int64)
        for layer, module in enumerate(self.experts):
            module.forward = self._replaced(layer, module.forward)

    @property
    def n_experts(self) -> int:
        """Number of experts of a layer"""
        return len(self.experts[0].down_proj)

    @property
    def expert_bytes(self) -> int:
        """Size of an expert in bfloat16"""
        one = self.experts[0]
        return 2 * (one.gate_up_proj[0].numel() + one.down_proj[0].numel())

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of sequences [N, S]."""
        self._ids = ids.flatten()
        return self._model(ids).logits  # type: ignore[no-any-return]

    def run(self, ids: torch.Tensor) -> None:
        """Send sequences through the model, for whoever watches."""
        for part in ids.split(_BATCH):
            self.logits(part)

    def expert(self, at: At) -> Answer:
        """Return an expert itself."""
        module, expert = self.experts[at[0]], at[1]
        return lambda x, _: _swiglu(
            module, x, module.gate_up_proj[expert], module.down_proj[expert]
        )

    def _replaced(self, layer: int, forward: Any) -> Any:
        def routed(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            plan = self.plan
            if layer in plan.rows:
                return plan.rows[layer][self._ids]
            gone = plan.missing.get(layer, [])
            stays = ~torch.isin(chosen, torch.tensor(gone, dtype=chosen.dtype))
            out: torch.Tensor = forward(x, chosen, weights * stays)
            for expert in gone:
                answer = plan.answers.get((layer, expert))
                at, slot = torch.where(chosen == expert)
                if answer is not None and len(at):
                    out.index_add_(0, at, answer(x[at], self._ids[at]) * weights[at, slot][:, None])
            if self.watch is not None:
                self.watch(layer, x, chosen, weights, out, self._ids)
            return out

        return routed


def _swiglu(
    module: Any, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    gate, up = torch.nn.functional.linear(x, gate_up).chunk(2, dim=-1)
    return torch.nn.functional.linear(module.act_fn(gate) * up, down)


@dataclass(slots=True)
class Fitted:
    """What the training text says about the experts that are not in memory."""

    missing: dict[int, list[int]]
    """Layer -> missing experts, the most used first"""
    means: dict[At, torch.Tensor]
    maps: dict[At, LinearFit]
    coded: dict[At, Answer]
    slots: list[TokenSums]
    beyond_mean: list[TokenSums]
    """Sums of the missed slots by layer: outputs, and outputs less the expert's mean"""
    layers: list[TokenSums]
    """Sums of the routed outputs by layer"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--judge", type=Path, nargs="+", required=True)
    parser.add_argument("--train-tokens", type=int, default=200_000)
    parser.add_argument("--judge-tokens", type=int, default=8192)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    folder = locate_model(a.model, offline=True).folder
    with record_rows(a.out, vars(a)) as kept, torch.inference_mode():
        model = Probed(folder)
        fitted = _fit(model, _text(folder, a.train, a.train_tokens), a.share)
        judge = Judge(model, _text(folder, a.judge, a.judge_tokens), fitted.missing)
        rows = [judge.row(kept, *variant) for variant in _variants(model, fitted)]
    print_table(HEADINGS, rows)


def _text(folder: Path, files: list[Path], n_tokens: int) -> torch.Tensor:
    """Return sequences [N, S] of as many tokens of each file, files taking turns."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n_each = n_tokens // len(files) // _SEQ_LEN
    parts = []
    for file in files:
        text = file.read_text(encoding="utf-8")[: 8 * n_each * _SEQ_LEN]
        ids = torch.tensor(tokenizer(text)["input_ids"][: n_each * _SEQ_LEN])
        parts.append(ids[: len(ids) // _SEQ_LEN * _SEQ_LEN].view(-1, _SEQ_LEN))
    return torch.stack([part[: min(map(len, parts))] for part in parts], dim=1).flatten(0, 1)


def _fit(model: Probed, ids: torch.Tensor, share: float) -> Fitted:
    """Return what is known of the missing experts; a tenth of the text says who they are."""
    used = torch.zeros(len(model.experts), model.n_experts)

    def count(layer: int, x: object, chosen: torch.Tensor, *_: object) -> None:
        used[layer] += torch.bincount(chosen.flatten(), minlength=model.n_experts)

    model.watch = count
    model.run(ids[: max(1, len(ids) // 10)])
    n_resident = round(share * model.n_experts)
    missing = {
        layer: row.argsort(descending=True)[n_resident:].tolist() for layer, row in enumerate(used)
    }
    inputs = _samples(model, ids[: max(1, len(ids) // 4)], missing)
    means, maps, coded = {}, {}, {}
    for at, x in inputs.items():
        y = model.expert(at)(x, x)
        means[at] = y.mean(0) if len(y) else torch.zeros(model.width)
        maps[at] = linear_fit(x, y)
        coded[at] = _as_codes(model.experts[at[0]], at[1], x)
    sums = _sums(model, ids, missing, means)
    return Fitted(missing, means, maps, coded, *sums)


def _samples(
    model: Probed, ids: torch.Tensor, missing: Mapping[int, list[int]]
) -> dict[At, torch.Tensor]:
    """Return inputs of each missing expert, [n, d], of the first _MOST_SAMPLES tokens."""
    found: dict[At, list[torch.Tensor]] = {(la, e): [] for la, es in missing.items() for e in es}

    def watch(layer: int, x: torch.Tensor, chosen: torch.Tensor, *_: object) -> None:
        for expert in missing[layer]:
            if sum(map(len, found[layer, expert])) < _MOST_SAMPLES:
                found[layer, expert].append(x[(chosen == expert).any(dim=1)].clone())

    model.watch = watch
    model.run(ids)
    return {at: torch.cat(parts)[:_MOST_SAMPLES] for at, parts in found.items()}


def _sums(
    model: Probed,
    ids: torch.Tensor,
    missing: Mapping[int, list[int]],
    means: Mapping[At, torch.Tensor],
) -> tuple[list[TokenSums], list[TokenSums], list[TokenSums]]:
    slots, beyond, layers = (
        [TokenSums(model.vocabulary, model.width) for _ in model.experts] for _ in range(3)
    )

    def watch(
        layer: int,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        layers[layer].add(tokens, out, torch.ones(len(out)))
        for expert in missing[layer]:
            at, slot = torch.where(chosen == expert)
            y, squared = model.expert((layer, expert))(x[at], at), weights[at, slot].square()
            slots[layer].add(tokens[at], y, squared)
            beyond[layer].add(tokens[at], y - means[layer, expert], squared)

    model.watch = watch
    model.run(ids)
    model.watch = None
    return slots, beyond, layers


def _as_map(fit: LinearFit, rank: int) -> Answer:
    parts = {k: v.float() for k, v in low_rank_map(fit, rank).items()}
    into, out, offset = (parts[f"low_rank_{name}"] for name in ("in", "out", "offset"))
    return lambda rows, _: rows @ into.T @ out.T + offset


def _as_codes(module: Any, expert: int, x: torch.Tensor) -> Answer:
    """Return an expert in few bits, rounded by the mean squares of its inputs."""
    whole, last = module.gate_up_proj[expert], module.down_proj[expert]
    gate, up = torch.nn.functional.linear(x, whole).chunk(2, dim=-1)
    inner = module.act_fn(gate) * up
    gate_up, down = (
        dequantize(quantize_imatrix(w, rows.square().sum(0), _BITS, group=_GROUP)).float()
        for w, rows in ((whole, x), (last, inner))
    )
    return lambda rows, _: _swiglu(module, rows, gate_up, down)


def _by_token(rows: torch.Tensor, offset: torch.Tensor | None = None) -> Answer:
    return lambda _, ids: rows[ids] if offset is None else rows[ids] + offset


Variant = tuple[str, int, Plan]
"""Name, bytes of all layers beside what is in memory, answers"""


def _variants(model: Probed, fitted: Fitted) -> Iterator[Variant]:
    """Yield what is judged: answers to missing experts, then rows for whole layers."""
    missing, n_layers = fitted.missing, len(model.experts)
    each = [(layer, expert) for layer, experts in missing.items() for expert in experts]

    def plan(answers: Mapping[At, Answer]) -> Plan:
        return Plan(missing=missing, answers=answers)

    def of_rows(tables: list[torch.Tensor], means: Mapping[At, torch.Tensor]) -> Plan:
        return plan({at: _by_token(tables[at[0]], means.get(at)) for at in each})

    vector = 2 * model.width
    map_bytes = vector * (2 * _MAP_RANK + 1)
    coded_bytes = round(model.expert_bytes / 16 * (_BITS + 16 / _GROUP))
    yield "nothing", 0, plan({})
    mean = [torch.stack([fitted.means[la, e] for e in missing[la]]).mean(0) for la in missing]
    flat = [row.expand(model.vocabulary, -1) for row in mean]
    yield "mean of the missing", n_layers * vector, of_rows(flat, {})
    own = [torch.zeros(model.vocabulary, model.width)] * n_layers
    yield "mean of each expert", len(each) * vector, of_rows(own, fitted.means)
    kinds: dict[str, tuple[Mapping[At, Answer], int]] = {
        f"map of rank {_MAP_RANK}": (
            {at: _as_map(fitted.maps[at], _MAP_RANK) for at in each},
            map_bytes,
        ),
        f"{_BITS}-bit": (fitted.coded, coded_bytes),
        "whole expert": ({at: model.expert(at) for at in each}, model.expert_bytes),
    }
    for name, (answers, size) in list(kinds.items())[:2]:
        yield f"{name}, all", len(each) * size, plan(answers)
    for rank in RANKS:
        size = table_bytes(model.vocabulary, model.width, rank)
        word = "full table" if rank is None else f"table of rank {rank}"
        yield word, n_layers * size, of_rows([s.rows(rank) for s in fitted.slots], {})
        tables = [s.rows(rank) for s in fitted.beyond_mean]
        yield (
            f"{word} + means",
            n_layers * size + len(each) * vector,
            of_rows(tables, fitted.means),
        )
        rank_of_maps = (size * n_layers // len(each) // vector - 1) // 2
        if rank_of_maps:
            maps = {at: _as_map(fitted.maps[at], rank_of_maps) for at in each}
            size_of_maps = len(each) * vector * (2 * rank_of_maps + 1)
            yield f"  map of rank {rank_of_maps}, all", size_of_maps, plan(maps)
        for name, (answers, one) in kinds.items():
            n_fit = min(size // one, min(map(len, missing.values())))
            some = {(la, e): answers[la, e] for la in missing for e in missing[la][:n_fit]}
            yield f"  {name}, {n_fit} a layer", len(some) * one, plan(some)
    yield from _layer_variants(model, fitted)


def _layer_variants(model: Probed, fitted: Fitted) -> Iterator[Variant]:
    """Yield plans in which one layer, or every other one, has rows for its routed output."""
    layers = range(len(model.experts))
    chosen = [[layer] for layer in layers] + [[*layers[1::2]]]
    size = table_bytes(model.vocabulary, model.width, None)
    for some in chosen:
        word = "layers " + ", ".join(map(str, some))
        zero = {la: torch.zeros(model.vocabulary, model.width) for la in some}
        yield f"{word}: nothing", 0, Plan(rows=zero)
        rows = {la: fitted.layers[la].rows(None) for la in some}
        yield f"{word}: full table", len(some) * size, Plan(rows=rows)


class Judge:
    """The whole model's answers to a text, and what plans make of them."""

    def __init__(self, model: Probed, ids: torch.Tensor, missing: Mapping[int, list[int]]) -> None:
        self._model, self._ids = model, ids
        self._slots: dict[At, tuple[torch.Tensor, ...]] = {}

        def watch(
            layer: int,
            x: torch.Tensor,
            chosen: torch.Tensor,
            weights: torch.Tensor,
            _: object,
            tokens: torch.Tensor,
        ) -> None:
            for expert in missing[layer]:
                at, slot = torch.where(chosen == expert)
                now = x[at].clone(), tokens[at].clone(), weights[at, slot].square()
                before = self._slots.get((layer, expert))
                both = now if before is None else (*map(torch.cat, zip(before, now, strict=True)),)
                self._slots[layer, expert] = both

        model.plan, model.watch = Plan(), watch
        self._truth = [self._answers(part) for part in ids.split(_BATCH)]
        model.watch = None

    def row(self, kept: RowFile, name: str, size: int, plan: Plan) -> list[str]:
        """Judge a plan; return the cells of its row."""
        self._model.plan = plan
        found = []
        for part, truth in zip(self._ids.split(_BATCH), self._truth, strict=True):
            kl = (truth.exp() * (truth - self._answers(part))).sum(-1)
            found.append(kl.mean(1))
        each = torch.cat(found)
        mean, away = float(each.mean()), 1.96 * float(each.std()) / len(each) ** 0.5
        share = self._explained(plan) if plan.missing else None
        kept.add("answer", name=name, bytes=size, kl=mean, half_interval=away, explained=share)
        words = "" if share is None else f"{share:.3f}"
        return [
            name,
            format_bytes(size),
            words,
            f"{mean:.4f}",
            f"[{mean - away:.4f}, {mean + away:.4f}]",
        ]

    def _explained(self, plan: Plan) -> float:
        """Return the share of the missed slots' energy that the answers explain, given the inputs
        of the whole model."""
        left = total = 0.0
        for at, (x, tokens, weights) in self._slots.items():
            y = self._model.expert(at)(x, tokens)
            answer = plan.answers.get(at)
            wrong = y if answer is None else y - answer(x, tokens)
            left += float((wrong.square().sum(1) * weights).sum())
            total += float((y.square().sum(1) * weights).sum())
        return 1 - left / total

    def _answers(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self._model.logits(ids), dim=-1)


if __name__ == "__main__":
    main()
