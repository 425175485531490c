"""Work of `bench` for a lookup bundle: one opening per budget and number of threads."""

import os
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch

from moe_tool.artifacts.bench_report import BenchedBundle, BenchReport, BenchRow, CacheState
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.benchmarking.bench import OnRow, timed_row
from moe_tool.benchmarking.bench_plan import BenchOptions, SpeedTest, list_tests
from moe_tool.benchmarking.bench_tokens import bench_tokens
from moe_tool.benchmarking.speed_run import Sample, forget_pages
from moe_tool.budget.sizes import format_bytes
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.lookup.disk_rows import checked_model
from moe_tool.lookup.lookup_account import chunk_of
from moe_tool.lookup.open_lookup import OpenedLookup, lookup_setup, open_lookup
from moe_tool.models.context_length import context_length
from moe_tool.models.kv_cache import new_kv_cache
from moe_tool.models.mole.load_mole import skeleton_bytes
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.progress import SILENT, Progress

_BITS = {"int8": "8", "nf4": "nf4"}


def bench_lookup(
    folder: Path,
    options: BenchOptions,
    *,
    on_row: OnRow | None = None,
    progress: Progress = SILENT,
) -> BenchReport:
    """Measure how fast a lookup bundle runs, in the terms of `bench`.

    A row that is read counts as a miss, as no row stays in memory; a stall is the time that reads
    of rows take, their check included.

    Args:
        options: budgets, threads, tests and text; there are no policies and no expert cache.
        on_row: called with every row as it is done.

    Raises:
        UsageError, BudgetError: as `open_lookup`, or a test exceeds the model's context.
        CorruptArtifactError, NotFoundError, StorageError: the bundle cannot be read.
    """
    start, load = time.perf_counter(), os.getloadavg()[0]
    bundle = LookupBundle.open(folder)
    config = checked_model(bundle).config
    tests = list_tests(options, context_limit=context_length(config))
    rows: list[BenchRow] = []
    for row in _rows(bundle, options, tests, progress):
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
    bundle: LookupBundle, options: BenchOptions, tests: Sequence[SpeedTest], progress: Progress
) -> Iterator[BenchRow]:
    """Yield every row as it is done."""
    positions = max(test.positions for test in tests)
    fed = bench_tokens(
        load_tokenizer(bundle.folder),
        n_tokens=(options.repetitions + 1) * positions,
        vocabulary=bundle.manifest.vocabulary,
        seed=options.seed,
        random=options.random,
        progress=progress,
    )
    described = _describe(bundle)
    for memory, threads in product(options.memory, options.threads):
        with open_lookup(
            bundle,
            memory=memory,
            positions=positions,
            threads=threads,
            throttle=options.throttle,
            progress=progress,
        ) as opened:
            for test in tests:
                progress.begin(f"{test.label}, {memory}", options.repetitions, "runs")
                row = timed_row(
                    _Runs(opened),
                    test,
                    options,
                    bundle=described,
                    setup=lookup_setup(opened),
                    budget=str(memory),
                    fed=fed,
                    progress=progress,
                )
                progress.end()
                yield row
            beside = opened.table.rows.bytes_beside
            if beside:
                progress.note(
                    f"{format_bytes(beside)} beside the rows were read, and waited for, to check "
                    "blocks of the table; each is checked once"
                )


class _Runs:
    """Runs of tests in an open bundle."""

    def __init__(self, opened: OpenedLookup) -> None:
        self._opened = opened

    @torch.inference_mode()
    def __call__(self, test: SpeedTest, ids: torch.Tensor, cache_state: CacheState) -> Sample:
        """Fill the context up to the test's depth, then time its tokens; see `run_test`."""
        opened, rows = self._opened, self._opened.table
        cache = new_kv_cache(opened.model.config, n_positions=test.positions)
        chunk = chunk_of(opened.model.config)

        def feed(part: torch.Tensor, at_once: int) -> int:
            for begin in range(0, len(part), at_once):
                opened.model(
                    input_ids=part[None, begin : begin + at_once],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            return -(-len(part) // at_once)

        feed(ids[: test.depth], chunk)
        if cache_state == "cold":
            forget_pages(opened.bundle.paths)
        n_bytes, waited, start = rows.rows.bytes_read, rows.seconds, time.perf_counter()
        n_forwards = feed(ids[test.depth : test.positions], chunk if test.kind == "pp" else 1)
        seconds = time.perf_counter() - start
        n_bytes = rows.rows.bytes_read - n_bytes
        counters = PhaseCounters(
            forwards=n_forwards,
            tokens=test.n_tokens,
            misses=n_bytes // opened.bundle.manifest.row_bytes,
            bytes_read=n_bytes,
            whole_bytes=n_bytes,
            stall_seconds=rows.seconds - waited,
        )
        return Sample(seconds=seconds, counters=counters)


def _describe(bundle: LookupBundle) -> BenchedBundle:
    manifest = bundle.manifest
    return BenchedBundle(
        model=manifest.identity.name,
        size_bytes=sum(file.size_bytes for file in manifest.files),
        params=manifest.vocabulary * manifest.row_width
        + skeleton_bytes(checked_model(bundle)) // 4,
        bits=_BITS.get(manifest.form, "native"),
        skeleton_bits="native",
    )
