"""SMoE's curve over alpha: hits, divergence, reads and time per token, and the fit of T(alpha).

    python benchmarks/near_tie_curve.py BUNDLE --text NAME=FILE [--text ...] [--out rows.jsonl]
        [--ratios 0.5,0.25] [--policies near-tie,smoe] [--throttle 50MB/s] [--tokens 1024]
        [--windows 3] [--within 0.75]

A hit is an answer that needs no read: the wanted expert, a near-tie or a replica in memory.
Residents are fixed: the profile's hottest experts, for `smoe` fewer of them beside replicas.
Divergence is from the same bundle with every miss read, with 95 % intervals over sequences; hits
and reads are of the same tokens, each sequence as if it ran alone. Time is of other passes, over
windows of the first text alone on the slowed-down disk, settings taking turns; `--windows 0`
leaves it out. `--within` asks for the least alpha whose fitted time is at most that share of
alpha 0's.
"""

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from result_rows import RowFile, print_table, record_rows
from slow_disk import time_windows
from text_tasks import token_stream
from time_fit import fit_times

from moe_tool.benchmarking.bench_plan import SpeedTest
from moe_tool.budget.request import parse_memory
from moe_tool.budget.sizes import format_bytes
from moe_tool.evaluation.figures import summarize
from moe_tool.evaluation.measure_policies import measure_policies
from moe_tool.policies.misses import EXACT_POLICY, MissChoice, parse_miss_policy
from moe_tool.progress import SILENT
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.store.throttle import Throttle, parse_throttle
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
HEADINGS = ("resident", "policy", "alpha", "hits", "KL", "95 %", "read per token", "ms per token")
_SEQ_LEN = 128
_TIMED = SpeedTest(kind="tg", n_tokens=48, depth=16)
Row = dict[str, object]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--ratios", default="0.5,0.25")
    parser.add_argument("--policies", default="near-tie,smoe")
    parser.add_argument("--throttle", default="50MB/s")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--within", type=float, default=0.75)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with record_rows(a.out, vars(a)) as kept:
        for ratio in map(float, a.ratios.split(",")):
            for policy in a.policies.split(","):
                rows = list(_curve(a, policy, ratio, kept))
                print_table(
                    HEADINGS, [[_cell(name, row[name]) for name in HEADINGS] for row in rows]
                )
                if a.windows:
                    _print_fit(rows, a.within, kept)


def _curve(a: argparse.Namespace, policy: str, ratio: float, kept: RowFile) -> Iterator[Row]:
    choices = [parse_miss_policy(f"{policy}:alpha={alpha}") for alpha in ALPHAS]
    with _open(a, ratio, batch=16) as session:
        text = build_sequences(
            parse_sources(a.text),
            session.tokenizer,
            vocabulary=session.manifest.shape.vocabulary,
            n_tokens=a.tokens,
            seq_len=_SEQ_LEN,
            holdout=0.0,
            seed=a.seed,
        )
        found = measure_policies(
            session,
            choices,
            residency="frozen",
            ids=torch.from_numpy(text.ids.astype("int64")),
            source=None,
            exact_fallback=False,
            progress=SILENT,
        )
    ms = _timed(a, choices, ratio) if a.windows else {}
    for alpha, choice in zip(ALPHAS, choices, strict=True):
        kl = summarize(found[choice], text.domain >= 0, seed=a.seed).kl_mean
        costs = found[choice].costs
        row: Row = {
            "resident": ratio,
            "policy": policy,
            "alpha": alpha,
            "hits": float(1 - costs.reads.sum() / (costs.accesses - costs.drops).sum()),
            "KL": kl.value,
            "95 %": f"[{kl.low:.4f}, {kl.high:.4f}]",
            "read per token": float(costs.bytes_read.mean()),
            "ms per token": statistics.median(ms[choice]) if ms else "-",
        }
        kept.add("setting", **row)
        yield row


def _open(
    a: argparse.Namespace, share: float, *, batch: int, slow: Throttle | None = None
) -> Session:
    options = RunOptions(
        memory=parse_memory(f"{100 * share:g}%"),
        policy=EXACT_POLICY,
        residency="frozen",
        throttle=slow,
        context=_SEQ_LEN,
        prompt_tokens=_SEQ_LEN,
        batch=batch,
        threads=a.threads,
        seed=a.seed,
    )
    return open_session(a.bundle, options)


def _timed(
    a: argparse.Namespace, choices: list[MissChoice], ratio: float
) -> dict[MissChoice, list[float]]:
    """Return every setting's milliseconds per token in each of the same windows of text."""
    with _open(a, ratio, batch=1, slow=parse_throttle(a.throttle)) as session:

        def answer_with(choice: MissChoice) -> None:
            session.use_policy(choice, residency="frozen")
            session.runner.store.load_pinned()

        source, n_tokens = parse_sources(a.text)[0], (a.windows + 1) * _TIMED.positions
        ids = token_stream(session.tokenizer, source, 16 * n_tokens, seed=a.seed)
        found = time_windows(
            session,
            torch.from_numpy(ids),
            _TIMED,
            n_windows=a.windows,
            ways={choice.name: partial(answer_with, choice) for choice in choices},
        )
    return {
        choice: [1e3 * each.seconds / _TIMED.n_tokens for each in found[choice.name]]
        for choice in choices
    }


def _print_fit(rows: list[Row], within: float, kept: RowFile) -> None:
    alphas, times = ([float(str(row[name])) for row in rows] for name in ("alpha", "ms per token"))
    fit = fit_times(alphas, times)
    limit = within * times[0]
    alpha = fit.weakest_within(limit)
    kept.add("fit", coefficients=fit.coefficients, residuals=fit.residuals, alpha=alpha)
    terms = " ".join(f"{c:+.3g} a^{2 - at}" for at, c in enumerate(fit.coefficients))
    print(f"T(a) = {terms} ms; largest residual {max(map(abs, fit.residuals)):.2g} ms")
    print(f"T <= {limit:.3g} ms: " + ("no alpha" if alpha is None else f"alpha {alpha:.3f}"))


def _cell(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if name == "read per token":
        return format_bytes(value)
    return f"{value:.4f}" if name == "KL" else f"{value:.3g}"


if __name__ == "__main__":
    main()
