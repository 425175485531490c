"""BuddyMoE's table: published and scaled buddies beside every other answer to a miss.

    python benchmarks/buddy_table.py OURS PUBLISHED --text NAME=FILE [--text ...] [--out rows.jsonl]
        [--ratios 0.75,0.5,0.375] [--tokens 2048] [--items 192] [--miss-per-layer 0.75]
        [--only quality|speed]

OURS is a bundle with the default lists (`buddies`) and cheaper forms, PUBLISHED the same with the
paper's (`buddies --by coactivation --alpha 0.9 --k 16 --scale none`). Residents are the profile's
hottest experts, fixed, but of `priced` and `replica`, which choose theirs in the same bytes. The
controls stand twice: under the published gates and rho, as the paper's Random, and under ours.

Divergence, perplexity and three tasks of four answers (text_tasks.py) are of the same text; tokens
per second of another pass (`--only speed`, on a quiet machine), one sequence alone, on a disk
slowed down so that reading one expert takes `--miss-per-layer` times as long as computing a layer:
17 MB of DeepSeek-V2-Lite's expert over PCIe 4 (25 GB/s) beside 0.93 ms, a 27th of the paper's
fastest row. "fetch" reads every miss into a
cache (lru); all others keep their residents.
"""

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from result_rows import RowFile, print_table, record_rows
from slow_disk import slow_disk, time_windows
from text_tasks import Task, accuracy, half_width, make_tasks, token_stream

from moe_tool.benchmarking.bench_plan import SpeedTest
from moe_tool.budget.request import parse_memory
from moe_tool.budget.sizes import format_bytes
from moe_tool.evaluation.equal_bytes import priced_settings
from moe_tool.evaluation.figures import summarize
from moe_tool.evaluation.measure_policies import measure_policies
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.misses import EXACT_POLICY, MissChoice, parse_miss_policy
from moe_tool.progress import SILENT
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.policy_choice import manifest_inputs
from moe_tool.runtime.price_list import price_book
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.store.throttle import Throttle
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources

_NAMES = ("resident", "answer to a miss")
_RIGHT = ("next word", "domain", "copy")
_QUALITY = ("KL", "95 %", "perplexity", *_RIGHT, "read per token")
_SPEED = ("tokens/s",)
_SEQ_LEN = 128
_TIMED = SpeedTest(kind="tg", n_tokens=48, depth=16)
_WINDOWS = 3
Row = dict[str, object]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=Path)
    parser.add_argument("published", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--ratios", default="0.75,0.5,0.375")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--items", type=int, default=192)
    parser.add_argument("--miss-per-layer", type=float, default=0.75)
    parser.add_argument("--only", choices=("quality", "speed"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with record_rows(a.out, vars(a)) as kept:
        rows = list(_rows(a, kept))
    headings = (
        *_NAMES,
        *(() if a.only == "speed" else _QUALITY),
        *(() if a.only == "quality" else _SPEED),
    )
    print_table(headings, [[_cell(name, row[name]) for name in headings] for row in rows])
    if a.only != "speed":
        right = {f"{at} {name}": float(row[name]) for at, row in enumerate(rows) for name in _RIGHT}
        print(f"accuracies: +- {half_width(right, a.items):.3f} at most (95 %)")


def _rows(a: argparse.Namespace, kept: RowFile) -> Iterator[Row]:
    tasks = make_tasks(load_tokenizer(a.ours), parse_sources(a.text), n_items=a.items, seed=a.seed)
    slow = None if a.only == "quality" else _slow_disk(a)
    if slow is not None:
        kept.add("disk", bytes_per_s=slow.bytes_per_s)
    for ratio in map(float, a.ratios.split(",")):
        for folder, choices in _choices(a.ours, a.published).items():
            found: dict[str, Row] = {
                name: {"resident": ratio, "answer to a miss": name} for name in choices
            }
            if a.only != "speed":
                for name, quality in _quality(a, folder, choices, ratio, tasks).items():
                    found[name] |= quality
            if slow is not None:
                for name, speed in _speeds(a, folder, choices, ratio, slow).items():
                    found[name]["tokens/s"] = speed
            for row in found.values():
                kept.add("answer", **row)
                yield row


def _choices(ours: Path, published: Path) -> dict[Path, dict[str, MissChoice]]:
    """Return the answers to measure with each bundle, by name in the table."""
    paper = parse_miss_policy("buddy:published")
    with BundleReader.open(published) as bundle:
        assert paper.spec.controls is not None
        named = paper.spec.controls(paper.values, manifest_inputs(bundle.manifest)) or ()
        controls = {
            f"{choice.spec.name}, published gates": choice
            for choice in map(parse_miss_policy, named)
            if choice.spec.name in ("random", "drop", "next-ranked")
        }
    with BundleReader.open(ours) as bundle:
        strict, *_ = priced_settings(price_book(bundle.manifest))[-1:]
    own = ("buddy", "random", "drop", "next-ranked", "near-tie", "replica", "priced")
    return {
        published: {"fetch": EXACT_POLICY, "buddy:published": paper, **controls},
        ours: {name: parse_miss_policy(name) for name in own} | {strict.name: strict},
    }


def _quality(
    a: argparse.Namespace,
    folder: Path,
    choices: dict[str, MissChoice],
    ratio: float,
    tasks: list[Task],
) -> dict[str, Row]:
    with _open(a, folder, ratio, batch=32) as session:
        text = build_sequences(
            parse_sources(a.text),
            session.tokenizer,
            vocabulary=session.manifest.shape.vocabulary,
            n_tokens=a.tokens,
            seq_len=_SEQ_LEN,
            holdout=0.0,
            seed=a.seed,
        )
        ids = torch.from_numpy(text.ids.astype("int64"))
        found = measure_policies(
            session,
            list(choices.values()),
            residency="frozen",
            ids=ids,
            source=None,
            exact_fallback=False,
            progress=SILENT,
        )
        right: dict[str, dict[str, float]] = {}
        for name, choice in choices.items():
            session.use_policy(choice, residency="frozen")
            right[name] = {task.name: accuracy(session, task) for task in tasks}
    rows: dict[str, Row] = {}
    for name, choice in choices.items():
        figures = summarize(found[choice], text.domain >= 0, seed=a.seed)
        kl = figures.kl_mean
        rows[name] = {
            "KL": kl.value,
            "95 %": f"{kl.low:.4f} to {kl.high:.4f}",
            "perplexity": figures.perplexity.value,
            **right[name],
            "read per token": figures.bytes_read_per_token.value,
        }
    return rows


def _open(
    a: argparse.Namespace, folder: Path, share: float, *, batch: int, slow: Throttle | None = None
) -> Session:
    options = RunOptions(
        memory=parse_memory(f"{100 * share:g}%"),
        policy=EXACT_POLICY,
        residency="cache" if batch == 1 else "frozen",
        throttle=slow,
        context=_SEQ_LEN,
        prompt_tokens=_SEQ_LEN,
        batch=batch,
        threads=a.threads,
        seed=a.seed,
    )
    return open_session(folder, options)


def _speeds(
    a: argparse.Namespace,
    folder: Path,
    choices: dict[str, MissChoice],
    ratio: float,
    slow: Throttle | None,
) -> dict[str, float]:
    """Return tokens per second, the median over windows of text, answers taking turns."""
    with _open(a, folder, ratio, batch=1, slow=slow) as session:

        def answer_with(choice: MissChoice) -> None:
            is_cached: Residency = "cache" if choice == EXACT_POLICY else "frozen"
            session.use_policy(choice, residency=is_cached)
            session.runner.store.load_pinned()

        ids = token_stream(session.tokenizer, parse_sources(a.text)[0], 8192, seed=a.seed)
        found = time_windows(
            session,
            torch.from_numpy(ids),
            _TIMED,
            n_windows=_WINDOWS,
            ways={name: partial(answer_with, choice) for name, choice in choices.items()},
        )
    return {
        name: statistics.median(_TIMED.n_tokens / each.seconds for each in samples)
        for name, samples in found.items()
    }


def _slow_disk(a: argparse.Namespace) -> Throttle:
    """Return the disk on which one miss takes the wanted share of a layer's time."""
    (fast,) = _speeds(a, a.ours, {"fetch": EXACT_POLICY}, 1.0, None).values()
    return slow_disk(a.ours, 1 / fast, miss_per_layer=a.miss_per_layer)


def _cell(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if name == "read per token":
        return format_bytes(value)
    return f"{value:.4f}" if name == "KL" else f"{value:.3g}"


if __name__ == "__main__":
    main()
