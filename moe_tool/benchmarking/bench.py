"""Work of `bench`: one session per setting, in it every policy and test."""

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from moe_tool.artifacts.bench_report import BenchedBundle, BenchReport, BenchRow
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.available_memory import peak_rss_bytes, reset_peak_rss
from moe_tool.benchmarking.bench_plan import (
    BenchOptions,
    Setting,
    SpeedTest,
    list_settings,
    list_tests,
)
from moe_tool.benchmarking.bench_tokens import bench_tokens
from moe_tool.benchmarking.speed_run import Sample, run_test
from moe_tool.errors import NotFoundError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.bundle_skeleton import n_skeleton_weights
from moe_tool.models.context_length import context_length
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.misses import MissChoice
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
        folder: the bundle.
        options: tests and settings to measure.
        on_row: called with every row as it is done, so that a later error loses nothing.
        progress: listener.

    Raises:
        UsageError: options are invalid, contradict the bundle or exceed the context.
        BudgetError: a memory budget is too small; earlier rows have been passed to `on_row`.
        CorruptArtifactError, NotFoundError, StorageError: the bundle cannot be read.
    """
    start = time.perf_counter()
    load = os.getloadavg()[0]
    for prefetch in options.prefetch:
        require_prefetch(prefetch, residency="cache")
    with BundleReader.open(folder) as reader:
        limit = context_length(read_config(folder).get_text_config())
        tests = list_tests(options, context_limit=limit)
        bundle = _describe(reader)
        vocabulary = reader.manifest.shape.vocabulary
    fed = bench_tokens(
        _tokenizer(folder),
        n_tokens=(options.repetitions + 1) * max(test.positions for test in tests),
        vocabulary=vocabulary,
        seed=options.seed,
        random=options.random,
        progress=progress,
    )
    rows: list[BenchRow] = []
    with closing(_rows(folder, options, tests, bundle=bundle, fed=fed, progress=progress)) as found:
        for row in found:
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return BenchReport(
        bundle=str(folder),
        repetitions=options.repetitions,
        seed=options.seed,
        load_average=load,
        rows=tuple(rows),
        seconds=time.perf_counter() - start,
    )


def _rows(
    folder: Path,
    options: BenchOptions,
    tests: Sequence[SpeedTest],
    *,
    bundle: BenchedBundle,
    fed: tuple[torch.Tensor, str],
    progress: Progress,
) -> Generator[BenchRow]:
    """Yield every test under every policy, in one session for each setting."""
    settings, n_done = list_settings(options), 0
    n_rows = len(settings) * len(options.policy) * len(tests)
    for setting in settings:
        with _open(folder, options, setting, tests, progress) as session:
            for test in _in_turn(session, options.policy, tests):
                n_done += 1
                progress.begin(f"row {n_done} of {n_rows}", options.repetitions, "runs")
                row = _row(session, test, options, setting, bundle, fed, progress)
                progress.end()
                yield row


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except NotFoundError:
        return None


def _open(
    folder: Path,
    options: BenchOptions,
    setting: Setting,
    tests: Sequence[SpeedTest],
    progress: Progress,
) -> Session:
    run = RunOptions(
        memory=setting.memory,
        gates=options.gates,
        seed=options.seed,
        threads=setting.threads,
        eviction=setting.eviction,
        prefetch=setting.prefetch,
        sparse_experts=setting.sparse_experts,
        context=max(test.positions for test in tests),
        prompt_tokens=max(1, *(t.positions if t.kind == "pp" else t.depth for t in tests)),
    )
    session = open_session(folder, run, tokenizer=_NO_TOKENIZER, progress=progress)
    try:
        for policy in options.policy:  # a policy that the bundle cannot run fails before any row
            session.use_policy(policy, residency=default_residency(policy))
    except BaseException:
        session.close()
        raise
    return session


def _in_turn(
    session: Session, policies: Sequence[MissChoice], tests: Sequence[SpeedTest]
) -> Iterator[SpeedTest]:
    """Yield every test once under every policy."""
    for policy in policies:
        session.use_policy(policy, residency=default_residency(policy))
        yield from tests


def _row(
    session: Session,
    test: SpeedTest,
    options: BenchOptions,
    setting: Setting,
    bundle: BenchedBundle,
    fed: tuple[torch.Tensor, str],
    progress: Progress,
) -> BenchRow:
    ids, tokens_from = fed
    can_reset = reset_peak_rss()
    samples = _repeat(session, test, ids, options, progress)
    return BenchRow(
        bundle=bundle,
        setup=run_setup(session),
        budget=str(setting.memory),
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


def _repeat(
    session: Session,
    test: SpeedTest,
    ids: torch.Tensor,
    options: BenchOptions,
    progress: Progress,
) -> list[Sample]:
    """Run a test on consecutive windows of the text; if warm, the first is not counted."""
    width = test.positions
    if options.cache == "warm":
        run_test(session, test, ids[:width], cache_state="warm")
    samples = []
    for window in range(1, options.repetitions + 1):
        part = ids[window * width : (window + 1) * width]
        samples.append(run_test(session, test, part, cache_state=options.cache))
        progress.advance()
    return samples


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
