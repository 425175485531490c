"""Pruning by trained mask routers beside the rules it has to beat, at equal rates.

    python benchmarks/learned_pruning.py BUNDLE --train news=FILE... --judge same=FILE other=FILE
        [--rate 0.25] [--rates 0.15,0.25,0.35] [--tokens 131072] [--judge-tokens 8192]
        [--out rows.jsonl]

Routers are trained once, for `--rate`, as `tune pruning` trains them, and judged on each source of
`--judge` at every rate: as the training ends (`all learned`), and as much of it as is kept
(`trained`), chosen on a sixteenth of `--train` that was not trained on. `untrained` are the routers
that training begins with: the ratio of gate weights with one threshold for all layers. `gate ratio`
is MC's rule (`prune`), which has a threshold per layer; `random` drops slots after the heaviest at
random. Every rule is given the thresholds at which it drops the wanted share of the judged text
itself, as routed with every expert running, so that rates are equal; the realised share is printed.
KL is that to the same bundle with every expert running, per token but the first of a sequence.
Intervals are of 95 %, over sequences; those of ratios resample both sides together.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from result_rows import RowFile, print_table, record_rows

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.evaluation.divergence import compare_logits
from moe_tool.models.skeleton import LayerCall
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.misses.prune_learned import rate_offsets
from moe_tool.progress import SILENT
from moe_tool.runtime.mask_scores import MaskTensors
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources
from moe_tool.tuning.blend_routers import choose_blend
from moe_tool.tuning.masked_experts import ChooseMask, MaskedExperts
from moe_tool.tuning.train_mask_router import (
    MaskTraining,
    TrainingPlan,
    is_prompt,
    ratio_routers,
    router_mask,
    watch_worth,
)

RULES = ("untrained", "trained", "all learned", "gate ratio", "random")
HEADINGS = ("text", "rate", "rule", "dropped", "KL", "interval", "to untrained", "to gate ratio")
_CHOSEN_ON = 16
"""One of so many sequences of the training text is not trained on, but chosen by"""
Routers = Mapping[int, MaskTensors]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--judge", nargs="+", required=True)
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--rates", default="0.15,0.25,0.35")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--judge-tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    options = run_options(
        memory="100%",
        policy="exact",
        residency="cache",
        context=a.seq_len,
        prompt_tokens=a.seq_len,
        batch=a.batch,
        threads=1,
    )
    lines: list[list[str]] = []
    with open_session(a.bundle, options) as session, record_rows(a.out, vars(a)) as kept:
        experts = MaskedExperts(session=session)
        session.skeleton.set_experts_function(experts)
        shape = session.manifest.shape
        most = (shape.top_k - 1) / shape.top_k
        text = _ids(a, shape, a.train, n_tokens=a.tokens)
        is_chosen_on = torch.arange(len(text)) % _CHOSEN_ON == 0
        plan = TrainingPlan(
            share=a.rate / most,
            ids=text[~is_chosen_on],
            batch=a.batch,
            seed=a.seed,
        )
        training = MaskTraining(shape, plan)
        training.begin(experts, micro_batch=a.batch)
        while training.step < plan.n_steps:
            training.advance(experts, micro_batch=a.batch)
        learned = {layer: router.frozen() for layer, router in training.routers.items()}
        blend = choose_blend(
            experts,
            ratio_routers(shape),
            learned,
            text[is_chosen_on],
            share=plan.share,
            micro_batch=a.batch,
            progress=SILENT,
        )
        kept.add("kept", share=blend.share, to_start=blend.to_start)
        print(f"kept {blend.share:g} of the way, {blend.to_start:.3f} of the start", flush=True)
        for source in parse_sources(a.judge):
            ids = _ids(a, shape, [f"{source.domain}={source.spec}"], n_tokens=a.judge_tokens)
            judge = Judge(experts, shape, blend.routers, learned, ids, batch=a.batch)
            for rate in map(float, a.rates.split(",")):
                lines += _compare(judge, source.domain, rate, most, kept)
    print_table(HEADINGS, lines)


def _ids(
    a: argparse.Namespace, shape: MoeShape, names: list[str], *, n_tokens: int
) -> torch.Tensor:
    text = build_sequences(
        parse_sources(names),
        load_tokenizer(a.bundle),
        vocabulary=shape.vocabulary,
        n_tokens=n_tokens,
        seq_len=a.seq_len,
        holdout=0.0,
        seed=a.seed,
        offline=True,
    )
    return torch.from_numpy(text.ids.astype(np.int64))


class Judge:
    """One text's divergences by rule and rate."""

    def __init__(
        self,
        experts: MaskedExperts,
        shape: MoeShape,
        trained: Routers,
        learned: Routers,
        ids: torch.Tensor,
        *,
        batch: int,
    ) -> None:
        """Score every slot of the text once, with every expert running.

        Args:
            ids: [N, S] int64 token ids.
            batch: sequences per forward.
        """
        self._experts, self._shape, self._batches = experts, shape, torch.split(ids, batch)
        self._seq_len = ids.shape[1]
        self._routers = {
            "trained": trained,
            "all learned": learned,
            "gate ratio": ratio_routers(shape),
        }
        self._worth = {name: self._scores(each) for name, each in self._routers.items()}
        self.dropped = 0.0
        """Share of the slots after the heaviest that the last `divergence` dropped"""

    def divergence(self, rule: str, share: float) -> np.ndarray:
        """Return KL in nats of a rule that drops a share of the slots after the heaviest,
        [N, S-1]."""
        choose = self._random(share) if rule == "random" else self._by_router(rule, share)
        counts = np.zeros(2)

        def counted(call: LayerCall) -> torch.Tensor:
            mask = choose(call)
            light = mask[~is_prompt(len(mask), self._seq_len), 1:]
            counts[:] += float((1 - light).sum()), light.numel()
            return mask

        found = []
        with torch.no_grad():
            for batch in self._batches:
                exact = self._experts.logits(batch)
                pruned = self._experts.logits(batch, mask=counted)
                pairs = zip(exact, pruned, strict=True)
                found += [compare_logits(one[1:], other[1:]).kl for one, other in pairs]
        self.dropped = counts[0] / counts[1]
        return np.stack(found)

    def _scores(self, routers: Routers) -> dict[int, np.ndarray]:
        parts = [watch_worth(self._experts, routers, batch) for batch in self._batches]
        return {at: np.concatenate([part[at] for part in parts]) for at in self._shape.layers}

    def _by_router(self, rule: str, share: float) -> ChooseMask:
        name = rule if rule in self._routers else "gate ratio"
        worth, wanted = self._worth[name], np.array([share])
        if rule == "gate ratio":
            limits = {at: float(rate_offsets(each, wanted)[0]) for at, each in worth.items()}
        else:
            limit = float(rate_offsets(np.concatenate(list(worth.values())), wanted)[0])
            limits = dict.fromkeys(worth, limit)
        return router_mask(self._routers[name], limits.__getitem__, self._seq_len)

    def _random(self, share: float) -> ChooseMask:
        draw = torch.Generator().manual_seed(0)

        def mask(call: LayerCall) -> torch.Tensor:
            kept = (torch.rand(call.weight.shape, generator=draw) >= share).float()
            kept[:, 0] = 1.0  # by rank: the heaviest
            return torch.where(is_prompt(len(kept), self._seq_len)[:, None], 1.0, kept)

        return mask


def _compare(judge: Judge, text: str, rate: float, most: float, kept: RowFile) -> list[list[str]]:
    found, dropped = {}, {}
    for rule in RULES:
        found[rule] = judge.divergence(rule, rate / most).mean(axis=1)  # by sequence
        dropped[rule] = most * judge.dropped
    lines = []
    for rule in RULES:
        own = found[rule]
        low, high = bootstrap_interval(own, lambda r: r.mean(axis=1), seed=0) or (np.nan, np.nan)
        ratios = {name: _ratio(own, found[name]) for name in ("untrained", "gate ratio")}
        kept.add(
            "pruning",
            text=text,
            rate=rate,
            rule=rule,
            dropped=dropped[rule],
            kl=own.mean(),
            interval=(low, high),
            by_sequence=own.tolist(),
            **{f"to {name}": ratio for name, ratio in ratios.items()},
        )
        cells = [text, f"{rate:g}", rule, f"{dropped[rule]:.3f}", f"{own.mean():.4f}"]
        cells += [f"{low:.4f}-{high:.4f}"]
        cells += [f"{at:.2f} [{low:.2f}-{high:.2f}]" for at, low, high in ratios.values()]
        lines.append(cells)
        print(" ".join(cells), flush=True)
    return lines


def _ratio(own: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of two mean divergences, with its interval."""
    both = np.stack([own, other], axis=1)  # [N, 2]
    interval = bootstrap_interval(
        both, lambda r: r[:, :, 0].mean(axis=1) / r[:, :, 1].mean(axis=1), seed=0
    )
    low, high = interval or (np.nan, np.nan)
    return float(own.mean() / other.mean()), low, high


if __name__ == "__main__":
    main()
