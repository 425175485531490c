"""Precision and recall of three ways to foretell the next layer's experts, on the same calls.

    python benchmarks/prefetch_precision.py BUNDLE --text SOURCE [--out rows.jsonl] [--memory 50%]
        [--alpha 0.3] [--windows 16]

`next-layer` applies a router to the input of the layer before, `two layers` to that of the layer
before this one (what `stacked:depth=2` adds), `partial` to the next layer's own input as far as the
experts in memory determine it. Decoding is exact, one sequence at a time, over an LRU cache from
which nothing is read ahead, so that all three see the same memory. Only layers that all three can
foretell are counted. Experts are those of the top-k that score at least 1 + alpha times the best
one not chosen (top), or all of the top-k (active); "missing" rows count those alone that are not
in memory when they are foretold, the only ones that a prefetch would read. Brackets are 95 %
intervals over windows of text; the last lines are of differences on the same windows.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from result_rows import print_table, record_rows
from text_tasks import token_stream

from moe_tool.budget.request import parse_memory
from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.misses import EXACT_POLICY
from moe_tool.policies.misses.score_shares import as_shares
from moe_tool.policies.prefetch import Prediction, keep_top_scores
from moe_tool.runtime.partial_layer import PartialLayer, PartialPredictor
from moe_tool.runtime.prefetcher import Prefetcher
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sources import parse_sources

WAYS = ("next-layer", "two layers", "partial")
FIGURES = {
    "top: are top": ("top of top", "top foretold"),
    "top: are active": ("active of top", "top foretold"),
    "top: found": ("top of top", "top wanted"),
    "active: are active": ("active of active", "active foretold"),
    "missing top: are top": ("missing top of top", "missing top foretold"),
    "missing top: are active": ("missing active of top", "missing top foretold"),
    "missing top: found": ("missing top of top", "missing top wanted"),
    "missing active: are active": ("missing active of active", "missing active foretold"),
}
"""Figure -> the counts whose ratio it is"""
_WINDOW, _PROMPT = 128, 16
_CHARACTERS = 2**20
"""Most of the text that windows are drawn from"""
Sets = tuple[np.ndarray, np.ndarray]
"""Top and active experts of a token, [E] bool each"""


@dataclass(slots=True)
class Observer:
    """Compares what was foretold of a layer with what its router then chose."""

    session: Session
    partial: PartialPredictor
    alpha: float
    counts: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """(way, count) -> its sum in each window"""
    _foretold: dict[int, dict[str, tuple[Sets, np.ndarray]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def predict(self, at: PartialLayer) -> Iterator[Prediction]:
        """Foretell by all three ways; nothing is read ahead."""
        ahead, layer = self.partial.ahead, at.call.layer
        seen = {(layer + 1, "next-layer"): at.call.routed_hidden}
        seen[layer + 2, "two layers"] = at.call.routed_hidden
        part = ahead.router_input(layer, at.routed)
        if part is not None:
            seen[layer + 1, "partial"] = part
        for (target, way), hidden in seen.items():
            modules = next((m for m in ahead.next.values() if m.layer == target), None)
            if modules is not None:
                routed = modules.route(hidden)
                there = self.session.runner.store.resident(target)[0]
                sets = self._sets(target, routed.logits, routed.index)
                self._foretold[target][way] = sets, there
        yield from ()

    def __call__(self, call: LayerCall) -> torch.Tensor:
        """Judge what was foretold of a layer and run it."""
        foretold = self._foretold.pop(call.layer, {})
        if len(foretold) == len(WAYS):
            assert call.router_logits is not None
            truth = self._sets(call.layer, call.router_logits, call.index)
            for way, (sets, there) in foretold.items():
                self._count(way, sets, truth, there)
        return self.session.runner(call)

    def begin_window(self) -> None:
        """Count apart from here on."""
        self._foretold.clear()
        for way in WAYS:
            for name in {name for pair in FIGURES.values() for name in pair}:
                self.counts.setdefault((way, name), []).append(0)

    def _sets(self, layer: int, logits: torch.Tensor, index: torch.Tensor) -> Sets:
        rule = self.partial.rules[layer]
        scores = rule.selection_scores(logits).float().numpy()
        share = as_shares(scores, are_logits=not rule.scores_differ)
        kept = keep_top_scores(index.numpy(), share, alpha=self.alpha)[0]
        top, active = np.zeros((2, share.shape[1]), dtype=bool)
        top[kept[kept >= 0]] = True
        active[index.numpy()[0]] = True
        return top, active

    def _count(self, way: str, foretold: Sets, truth: Sets, there: np.ndarray) -> None:
        for prefix, among in (("", np.ones_like(there)), ("missing ", ~there)):
            top, active = (each & among for each in foretold)
            is_top, is_active = (each & among for each in truth)
            found = {
                "top foretold": top,
                "top wanted": is_top,
                "top of top": top & is_top,
                "active of top": top & is_active,
                "active foretold": active,
                "active of active": active & is_active,
            }
            for name, mask in found.items():
                self.counts[way, prefix + name][-1] += int(mask.sum())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--memory", default="50%")
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with record_rows(a.out, vars(a)) as kept:
        observer = _observe(a)
        for (way, name), sums in observer.counts.items():
            kept.add("counts", way=way, count=name, by_window=sums)
        table = {way: [_ratio(observer, a.seed, name, way) for name in FIGURES] for way in WAYS}
        rows = [[name, *(table[way][at] for way in WAYS)] for at, name in enumerate(FIGURES)]
        print_table(("experts foretold", *WAYS), rows)
        for name in FIGURES:
            less = _ratio(observer, a.seed, name, "partial", less="next-layer")
            print(f"partial - next-layer, {name}: {less}")


def _observe(a: argparse.Namespace) -> Observer:
    options = RunOptions(
        memory=parse_memory(a.memory),
        policy=EXACT_POLICY,
        residency="cache",
        prefetch="partial",
        context=_WINDOW,
        prompt_tokens=_PROMPT,
        threads=a.threads,
        seed=a.seed,
    )
    with open_session(a.bundle, options) as session, torch.inference_mode():
        prefetcher = session.runner.part_prefetcher
        assert prefetcher is not None and isinstance(prefetcher.predictor, PartialPredictor)
        observer = Observer(session, prefetcher.predictor, a.alpha)
        session.runner.part_prefetcher = Prefetcher(predictor=observer, close=prefetcher.close)
        session.skeleton.set_experts_function(observer)
        source = parse_sources([a.text])[0]
        ids = torch.from_numpy(token_stream(session.tokenizer, source, _CHARACTERS, seed=a.seed))
        every = ids[: len(ids) // _WINDOW * _WINDOW].view(-1, _WINDOW)
        generator = torch.Generator().manual_seed(a.seed)
        for window in every[torch.randperm(len(every), generator=generator)[: a.windows]]:
            observer.begin_window()
            cache = session.new_cache()
            for part in (window[:_PROMPT], *window[_PROMPT:].split(1)):
                session.model(input_ids=part[None], past_key_values=cache, use_cache=True)
    return observer


def _ratio(observer: Observer, seed: int, figure: str, way: str, *, less: str | None = None) -> str:
    """Return a figure with its interval; with `less`, its difference from another way's."""
    part, whole = FIGURES[figure]
    names = [(way, part), (way, whole)]
    names += [] if less is None else [(less, part), (less, whole)]
    sums = np.array([observer.counts[name] for name in names]).T  # [N, 2 or 4]

    def statistic(values: np.ndarray) -> np.ndarray:
        total = values.sum(axis=1).T.astype(float)  # [2 or 4, R]
        found: np.ndarray = total[0] / np.maximum(total[1], 1)
        return found if less is None else found - total[2] / np.maximum(total[3], 1)

    low, high = bootstrap_interval(sums, statistic, seed=seed)
    return f"{statistic(sums[None])[0]:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
