"""The story of `bench`: a session per budget and number of threads, in it every policy and test."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_tool.artifacts.precision import bits_of
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.benchmarking.bench_plan import (
    BenchOptions,
    CacheState,
    Setting,
    SpeedTest,
    list_settings,
    list_tests,
)
from moe_tool.benchmarking.bench_tokens import bench_tokens
from moe_tool.benchmarking.peak_memory import reset_peak_rss
from moe_tool.benchmarking.speed_run import Sample, run_test
from moe_tool.errors import NotFoundError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.context_length import context_length
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.eviction import parse_eviction
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.moe_layer import Residency
from moe_tool.runtime.policy_choice import EXACT, require_policy
from moe_tool.runtime.prefetcher import require_prefetch
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session

_NO_TOKENIZER = object()
"""Keeps `open_session` from looking for one: nothing here turns tokens into text"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One row of the table: means over the repetitions."""

    model: str
    size_bytes: int
    """Of the bundle's files"""
    params: int
    """Weights in the bundle, experts and skeleton; a tied head's own copy counts"""
    bits: str
    """Of the experts: native, 8, 4"""
    skeleton_bits: str
    """Of the matrices outside experts and routers: native, 8, 4"""
    budget: str
    """As it was asked for"""
    budget_bytes: int
    slots: int
    """Expert records in memory"""
    policy: str
    residency: str
    eviction: str
    prefetch: str
    sparse_experts: float | None
    """Share of experts' channels that was to be left out; None: of none"""
    sparsity: float
    """That was left out"""
    threads: int
    test: str
    n_tokens: int
    depth: int
    tokens_per_second: float
    tokens_per_second_sd: float
    """Sample standard deviation over the repetitions; 0 for one"""
    tokens_per_second_all: tuple[float, ...]
    hit_rate: float
    bytes_per_token: float
    """Read from the bundle, prefetched bytes included"""
    prefetches_per_token: float
    """Experts that the store was told to expect"""
    prefetch_hit_rate: float
    """Share of them that the next layer wanted; 0 where there were none"""
    prefetched_bytes_per_token: float
    stall_seconds: float
    """All repetitions together"""
    stall_share: float
    """Of the time, 0 to 1"""
    peak_rss_bytes: int
    peak_rss_of: str
    """row: while this row ran; process: since the process began, where the peak cannot be reset"""
    cache: CacheState
    """cold: expert cache and page cache emptied before every repetition; warm: after one run that
    is not counted"""
    tokens_from: str
    """text or random"""
    load_average: float
    """Of the machine, over the last minute, when the row was done; our own threads included"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """All rows, in the order in which they ran."""

    bundle: str
    repetitions: int
    seed: int
    load_average: float
    """Of the machine, over the last minute, before the first row"""
    rows: tuple[BenchRow, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `--json`."""
        return asdict(self)


OnRow = Callable[[BenchRow], None]


def bench(
    folder: Path,
    options: BenchOptions,
    *,
    on_row: OnRow | None = None,
    progress: Progress = SILENT,
) -> BenchReport:
    """Measure how fast a bundle runs.

    Every repetition continues in text that none before it has seen: a cache that has just answered
    the same tokens would flatter itself. A session is planned for the longest test, so that all
    rows of one budget have the same expert slots.

    Args:
        folder: of the bundle.
        options: what is measured.
        on_row: called with every row as it is done, so that a later error loses nothing.
        progress: told about the rows.

    Raises:
        UsageError: options that mean nothing, contradict the bundle or go beyond the context.
        BudgetError: a memory budget does not suffice; rows of the budgets before it were told.
        CorruptArtifactError, NotFoundError, StorageError: the bundle.
    """
    start = time.perf_counter()
    load = os.getloadavg()[0]
    for policy in options.policy:
        require_policy(policy)
    for prefetch in options.prefetch:
        require_prefetch(prefetch)
    for eviction in options.eviction:
        parse_eviction(eviction)
    with BundleReader.open(folder) as bundle:
        limit = context_length(read_config(folder).get_text_config())
        tests = list_tests(options, context_limit=limit)
        facts = _describe(bundle)
        vocabulary = bundle.manifest.shape.vocabulary
    ids, tokens_from = bench_tokens(
        _tokenizer(folder),
        n_tokens=(options.repetitions + 1) * max(test.positions for test in tests),
        vocabulary=vocabulary,
        seed=options.seed,
        random=options.random,
        progress=progress,
    )
    settings = list_settings(options)
    rows: list[BenchRow] = []
    n_rows = len(settings) * len(options.policy) * len(tests)
    for setting in settings:
        with _open(folder, options, setting, tests, progress) as session:
            for policy, residency, test in _in_turn(session, options.policy, tests):
                progress.begin(f"row {len(rows) + 1} of {n_rows}", options.repetitions, "runs")
                can_reset = reset_peak_rss()
                samples = _repeat(session, test, ids, options, progress)
                row = BenchRow(
                    **facts,
                    **_figures(test, samples),
                    budget=setting.memory,
                    budget_bytes=session.plan.budget_bytes,
                    slots=session.plan.n_slots,
                    policy=policy,
                    residency=residency,
                    eviction=session.setting.eviction.name,
                    prefetch=setting.prefetch,
                    sparse_experts=setting.sparse_experts,
                    threads=session.threads.n_threads,
                    test=test.label,
                    n_tokens=test.n_tokens,
                    depth=test.depth,
                    peak_rss_bytes=peak_rss_bytes(),
                    peak_rss_of="row" if can_reset else "process",
                    cache=options.cache,
                    tokens_from=tokens_from,
                    load_average=os.getloadavg()[0],
                )
                progress.end()
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
        prompt=max(1, *(t.positions if t.kind == "pp" else t.depth for t in tests)),
    )
    session = open_session(folder, run, tokenizer=_NO_TOKENIZER, progress=progress)
    try:
        for policy in options.policy:  # one that the bundle cannot run is refused before any row
            session.use_policy(policy, residency=_residency(policy))
    except BaseException:
        session.close()
        raise
    return session


def _residency(policy: str) -> Residency:
    """What a run of this policy has by default."""
    return "cache" if policy == EXACT else "frozen"


def _in_turn(
    session: Session, policies: Sequence[str], tests: Sequence[SpeedTest]
) -> Iterator[tuple[str, Residency, SpeedTest]]:
    for policy in policies:
        residency = _residency(policy)
        session.use_policy(policy, residency=residency)
        for test in tests:
            yield policy, residency, test


def _repeat(
    session: Session,
    test: SpeedTest,
    ids: torch.Tensor,
    options: BenchOptions,
    progress: Progress,
) -> list[Sample]:
    """Run a test on one window of the text after the other; where warm, the first is not
    counted."""
    width = test.positions
    if options.cache == "warm":
        run_test(session, test, ids[:width], cache_state="warm")
    samples = []
    for window in range(1, options.repetitions + 1):
        part = ids[window * width : (window + 1) * width]
        samples.append(run_test(session, test, part, cache_state=options.cache))
        progress.advance()
    return samples


def _figures(test: SpeedTest, samples: Sequence[Sample]) -> dict[str, Any]:
    rates = [test.n_tokens / sample.seconds for sample in samples]
    counters = [sample.counters for sample in samples]
    hits = sum(each.hits for each in counters)
    accesses = hits + sum(each.misses for each in counters)
    stalled = sum(each.stall_seconds for each in counters)
    prefetches = sum(each.prefetches for each in counters)
    n_tokens = test.n_tokens * len(samples)
    n_channels = sum(each.channels for each in counters)
    return {
        "tokens_per_second": statistics.mean(rates),
        "tokens_per_second_sd": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "tokens_per_second_all": tuple(rates),
        "hit_rate": hits / accesses if accesses else 1.0,
        "sparsity": 1 - sum(each.channels_used for each in counters) / n_channels
        if n_channels
        else 0.0,
        "bytes_per_token": sum(each.bytes_read for each in counters) / n_tokens,
        "prefetches_per_token": prefetches / n_tokens,
        "prefetch_hit_rate": sum(each.prefetch_hits for each in counters) / max(1, prefetches),
        "prefetched_bytes_per_token": sum(each.prefetched_bytes for each in counters) / n_tokens,
        "stall_seconds": stalled,
        "stall_share": stalled / sum(sample.seconds for sample in samples),
    }


def _describe(bundle: BundleReader) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "model": manifest.identity.name,
        "size_bytes": sum(file.size_bytes for file in manifest.files),
        "params": len(manifest.own_records) * manifest.shape.n_expert_weights
        + bundle.n_skeleton_weights,
        "bits": "mixed" if manifest.others else bits_of(manifest.precision),
        "skeleton_bits": bits_of(manifest.skeleton_precision),
    }
