"""Time that decoding waits for experts, with and without prefetch, on a slowed-down disk.

    python benchmarks/prefetch_stall.py BUNDLE --text SOURCE [--memory 50%] [--throttle 200MB/s]
        [--miss-per-layer 1] [--layer-ms 30] [--windows 5] [--tokens 64] [--out rows.jsonl]

One sequence of given text is decoded. `exact` reads every miss in full into a cache; `replica`
reads it in full, in the cheaper form or not at all, as HOBBIT does, into two caches. Rows take
turns over the windows of text, each from an empty cache that the window's prompt fills, so that
counts are the same every time; times are medians over windows with their lowest and highest.
"saved" is the median over windows of the share of the stall without prefetch that is gone.

Without `--throttle`, the disk passes one expert in `--miss-per-layer` times the time that a layer
takes to compute with everything in memory. `--layer-ms` lets every layer take that long, as on a
slower machine, by sleeping: on a busy machine only then does stall mean anything, as long as the
layers themselves take less.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from result_rows import RowFile, print_table, record_rows, spread_of
from slow_disk import slow_disk, time_windows
from text_tasks import token_stream

from moe_tool.benchmarking.bench_plan import SpeedTest
from moe_tool.benchmarking.speed_run import Sample
from moe_tool.budget.request import parse_memory
from moe_tool.budget.sizes import format_bytes
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.misses import EXACT_POLICY, MissChoice, parse_miss_policy
from moe_tool.runtime.prefetcher import choose_prefetcher
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.store.throttle import Throttle, parse_throttle
from moe_tool.text.sources import parse_sources

HEADINGS = (
    *("policy", "prefetch", "stall ms a token", "saved", "tokens/s", "hit rate"),
    *("read per token", "prefetched", "prefetches a token", "of them wanted"),
)
_DEPTH = 16
_PREFETCH = ("none", "next-layer", "stacked:depth=1", "stacked:depth=2", "stacked:depth=3")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--memory", default="50%")
    parser.add_argument("--policies", default="exact,replica", help="comma-separated")
    parser.add_argument("--throttle")
    parser.add_argument("--miss-per-layer", type=float, default=1.0)
    parser.add_argument("--layer-ms", type=float)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with record_rows(a.out, vars(a)) as kept:
        slow = parse_throttle(a.throttle) if a.throttle else _slow_disk(a)
        print(f"{slow.describe()}; {a.memory} of the experts, lru")
        rows = list(_rows(a, slow, kept))
    print_table(HEADINGS, rows)


def _rows(a: argparse.Namespace, slow: Throttle, kept: RowFile) -> Iterator[list[str]]:
    for policy in map(parse_miss_policy, a.policies.split(",")):
        with _open(a, a.memory, policy, slow) as session:
            found = _measured(a, session, _PREFETCH)
        without = [each.counters.stall_seconds for each in found["none"]]
        for name, samples in found.items():
            for number, each in enumerate(samples):
                kept.add(
                    "window",
                    policy=policy.name,
                    prefetch=name,
                    window=number,
                    bytes_per_s=slow.bytes_per_s,
                    seconds=each.seconds,
                    **each.counters.keys_of(""),
                )
            yield [policy.name, name, *_cells(samples, without, a.tokens)]


def _cells(samples: list[Sample], without: list[float], n: int) -> list[str]:
    """Return the figures of samples of `n` tokens; `without`: stall of each window without
    prefetch, in seconds."""
    stalls = [each.counters.stall_seconds for each in samples]
    saved = [1 - now / before for now, before in zip(stalls, without, strict=True) if before > 0]
    total = sum((each.counters for each in samples[1:]), samples[0].counters)
    return [
        str(spread_of([1e3 * stall / n for stall in stalls])),
        str(spread_of(saved)) if saved else "-",
        str(spread_of([n / each.seconds for each in samples])),
        f"{total.hit_rate:.3f}",
        format_bytes(total.bytes_read_per_token),
        format_bytes(total.prefetched_bytes / total.tokens),
        f"{total.prefetches / total.tokens:.2f}",
        f"{total.prefetch_hit_rate:.2f}" if total.prefetches else "-",
    ]


def _open(a: argparse.Namespace, memory: str, policy: MissChoice, slow: Throttle | None) -> Session:
    options = RunOptions(
        memory=parse_memory(memory),
        policy=policy,
        residency="cache",
        throttle=slow,
        context=_DEPTH + a.tokens,
        prompt_tokens=_DEPTH,
        threads=a.threads,
    )
    return open_session(a.bundle, options)


def _measured(
    a: argparse.Namespace, session: Session, names: tuple[str, ...]
) -> dict[str, list[Sample]]:
    """Return the samples of every way to prefetch, one per window of text."""
    n_tokens = (a.windows + 1) * (_DEPTH + a.tokens)
    ids = token_stream(session.tokenizer, parse_sources([a.text])[0], 16 * n_tokens, seed=0)
    if a.layer_ms:
        _slow_layers(session, a.layer_ms / 1e3)

    def prefetch_by(name: str) -> None:
        session.empty_cache()
        session.runner.prefetcher = choose_prefetcher(
            name, session.skeleton.layers, session.plan.policy.rules
        )

    return time_windows(
        session,
        torch.from_numpy(ids),
        SpeedTest(kind="tg", n_tokens=a.tokens, depth=_DEPTH),
        n_windows=a.windows,
        ways={name: partial(prefetch_by, name) for name in names},
    )


def _slow_layers(session: Session, layer_s: float) -> None:
    """Let every layer call of decoding take a time, that of waiting for reads not counted."""
    runner = session.runner

    def run(call: LayerCall) -> torch.Tensor:
        before, began = runner.stats.decode.stall_seconds, time.perf_counter()
        output = runner(call)
        if runner.forward.phase == "decode":
            waited = runner.stats.decode.stall_seconds - before
            time.sleep(max(0.0, layer_s - (time.perf_counter() - began - waited)))
        return output

    session.skeleton.set_experts_function(run)


def _slow_disk(a: argparse.Namespace) -> Throttle:
    """Return the disk that passes one expert in the wanted share of a layer's time."""
    if a.layer_ms:
        with BundleReader.open(a.bundle) as bundle:
            token_s = len(bundle.manifest.shape.layers) * a.layer_ms / 1e3
    else:
        with _open(a, "100%", EXACT_POLICY, None) as session:
            samples = _measured(a, session, ("none",))["none"]
        token_s = spread_of([each.seconds for each in samples]).median / a.tokens
    return slow_disk(a.bundle, token_s, miss_per_layer=a.miss_per_layer)


if __name__ == "__main__":
    main()
