"""Work of `bench`: one session per setting, in it every policy and test."""

import os
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch

from moe_tool.artifacts.bench_report import BenchedBundle, BenchReport, BenchRow, CacheState
from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.run_result import RunSetup
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.available_memory import peak_rss_bytes, reset_peak_rss
from moe_tool.benchmarking.bench_plan import BenchOptions, SpeedTest, list_tests
from moe_tool.benchmarking.bench_tokens import bench_tokens
from moe_tool.benchmarking.speed_run import Sample, run_test
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.bundle_skeleton import n_skeleton_weights
from moe_tool.models.context_length import context_length
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.misses import EXACT_POLICY
from moe_tool.policies.prefetch import NO_PREFETCH
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.generation import run_setup
from moe_tool.runtime.prefetcher import require_prefetch
from moe_tool.runtime.run_options import RunOptions, default_residency
from moe_tool.runtime.session import Session, open_session

_NO_TOKENIZER = object()
"""Stand-in that keeps `open_session` from loading a tokenizer, which nothing here needs"""

OnRow = Callable[[BenchRow], None]


def bench(
    folder: Path,
    options: BenchOptions,
    *,
    on_row: OnRow | None = None,
    progress: Progress = SILENT,
) -> BenchReport:
    """Measure how fast a bundle runs.

    Every repetition uses text that no earlier one has seen, because a cache warmed by the same
    tokens would look too good. A session is planned for the longest test, so that all rows of one
    budget have the same expert slots.

    Args:
        on_row: called with every row as it is done, so that a later error loses nothing.

    Raises:
        UsageError: options are invalid, contradict the bundle or exceed the context.
        BudgetError: a memory budget is too small; earlier rows have been passed to `on_row`.
        CorruptArtifactError, NotFoundError, StorageError: the bundle cannot be read.
    """
    start, load = time.perf_counter(), os.getloadavg()[0]
    for prefetch in options.prefetch:
        require_prefetch(prefetch or NO_PREFETCH, residency="cache")
    with BundleReader.open(folder) as reader:
        limit = context_length(read_config(folder).get_text_config())
        tests = list_tests(options, context_limit=limit)
        bundle = _describe(reader)
        manifest = reader.manifest
    fed = bench_tokens(
        load_tokenizer(folder),
        n_tokens=(options.repetitions + 1) * max(test.positions for test in tests),
        vocabulary=manifest.shape.vocabulary,
        seed=options.seed,
        random=options.random,
        progress=progress,
    )
    runs = _runs(options, tests, manifest)
    n_rows = len(runs) * len(options.policy) * len(tests)
    rows: list[BenchRow] = []
    for run in runs:
        with open_session(folder, run, tokenizer=_NO_TOKENIZER, progress=progress) as session:
            for policy in options.policy:  # one that the bundle cannot run fails before any row
                session.use_policy(policy, residency=default_residency(policy, session.manifest))
            for policy in options.policy:
                session.use_policy(policy, residency=default_residency(policy, session.manifest))
                for test in tests:
                    progress.begin(f"row {len(rows) + 1} of {n_rows}", options.repetitions, "runs")
                    rows.append(_row(session, test, options, run, bundle, fed, progress))
                    progress.end()
                    if on_row is not None:
                        on_row(rows[-1])
    return BenchReport(
        bundle=str(folder),
        repetitions=options.repetitions,
        seed=options.seed,
        load_average=load,
        rows=tuple(rows),
        seconds=time.perf_counter() - start,
    )


def _runs(
    options: BenchOptions, tests: Sequence[SpeedTest], manifest: BundleManifest
) -> list[RunOptions]:
    """Return the options of every session to open, each planned for the longest test."""
    context = max(test.positions for test in tests)
    prompts = (test.positions if test.kind == "pp" else test.depth for test in tests)
    prompt_tokens = max(1, *prompts)
    is_frozen = any(default_residency(each, manifest) == "frozen" for each in options.policy)
    return [
        RunOptions(
            memory=memory,
            policy=EXACT_POLICY,
            throttle=options.throttle,
            gates=options.gates,
            seed=options.seed,
            threads=threads,
            eviction=eviction,
            # A fixed set of experts, which another policy of the list keeps, is never read ahead.
            prefetch="none" if prefetch is None and is_frozen else prefetch,
            sparse_experts=sparse,
            context=context,
            prompt_tokens=prompt_tokens,
        )
        for memory, threads, eviction, prefetch, sparse in product(
            options.memory,
            options.threads,
            options.eviction,
            options.prefetch,
            options.sparse_experts,
        )
    ]


def _row(
    session: Session,
    test: SpeedTest,
    options: BenchOptions,
    run: RunOptions,
    bundle: BenchedBundle,
    fed: tuple[torch.Tensor, str],
    progress: Progress,
) -> BenchRow:
    return timed_row(
        lambda test, ids, cache: run_test(session, test, ids, cache_state=cache),
        test,
        options,
        bundle=bundle,
        setup=run_setup(session),
        budget=str(session.plan.footprint.request),
        fed=fed,
        progress=progress,
    )


def timed_row(
    run: Callable[[SpeedTest, torch.Tensor, CacheState], Sample],
    test: SpeedTest,
    options: BenchOptions,
    *,
    bundle: BenchedBundle,
    setup: RunSetup,
    budget: str,
    fed: tuple[torch.Tensor, str],
    progress: Progress,
) -> BenchRow:
    """Run a test on consecutive windows of the text; if warm, the first is not counted.

    Args:
        run: runs a test on tokens [depth + n_tokens].
        fed: tokens of all windows, and where they are from.
    """
    ids, tokens_from = fed
    can_reset = reset_peak_rss()
    first, *windows = torch.split(ids, test.positions)[: options.repetitions + 1]
    if options.cache == "warm":
        run(test, first, "warm")
    samples = []
    for window in windows:
        samples.append(run(test, window, options.cache))
        progress.advance()
    return BenchRow(
        bundle=bundle,
        setup=setup,
        budget=budget,
        test=test.label,
        n_tokens=test.n_tokens,
        depth=test.depth,
        tokens_per_second_all=tuple(test.n_tokens / sample.seconds for sample in samples),
        timed=sum((sample.counters for sample in samples), PhaseCounters()),
        peak_rss_bytes=peak_rss_bytes(),
        peak_rss_of="row" if can_reset else "process",
        cache=options.cache,
        tokens_from=tokens_from,
        load_average=os.getloadavg()[0],
    )


def _describe(reader: BundleReader) -> BenchedBundle:
    manifest = reader.manifest
    return BenchedBundle(
        model=manifest.identity.name,
        size_bytes=sum(file.size_bytes for file in manifest.files),
        params=len(manifest.primary_records) * manifest.shape.n_expert_weights
        + n_skeleton_weights(reader),
        bits=manifest.bits,
        skeleton_bits=manifest.skeleton_precision.name,
    )
