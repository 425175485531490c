"""One timed run of a test in an open session.

Only forward passes are timed, as in llama-bench: no sampling, no detokenizing.
"""

import inspect
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

from moe_tool.artifacts.bench_report import CacheState
from moe_tool.artifacts.run_stats import PhaseCounters, RunStats
from moe_tool.benchmarking.bench_plan import SpeedTest
from moe_tool.errors import StorageError
from moe_tool.runtime.session import Session
from moe_tool.runtime.working_set import prefill_chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Time and counters of one run of a test."""

    seconds: float
    counters: PhaseCounters
    """Counters of the timed tokens alone"""


@torch.inference_mode()
def run_test(
    session: Session, test: SpeedTest, ids: torch.Tensor, *, cache_state: CacheState
) -> Sample:
    """Fill the context up to the test's depth, then time its tokens.

    Args:
        session: an open session; its counters are reset at the depth.
        test: the test to time.
        ids: [depth + n_tokens] int64.
        cache_state: cold empties the expert cache and the page cache of the bundle's files when the
            depth is reached; warm leaves both as they are.

    Raises:
        CorruptArtifactError, StorageError: an expert cannot be read.
    """
    cache = session.new_cache()
    is_prompt = test.kind == "pp"
    # Positions before this one count as prompt, whose misses every policy fetches.
    session.prompt_tokens = test.positions if is_prompt else test.depth
    try:
        chunk = prefill_chunk(session.plan.workload)
        _feed(session, cache, ids[: test.depth], chunk)
        if cache_state == "cold":
            _make_cold(session)
        session.runner.stats = RunStats()
        start = time.perf_counter()
        _feed(session, cache, ids[test.depth : test.positions], chunk if is_prompt else 1)
        seconds = time.perf_counter() - start
    finally:
        session.prompt_tokens = None
    counted = session.runner.stats.phase("prompt" if is_prompt else "decode")
    # A copy: the session goes on counting into its own until the next test begins.
    return Sample(seconds=seconds, counters=counted + PhaseCounters())


def _feed(session: Session, cache: DynamicCache, ids: torch.Tensor, chunk: int) -> None:
    # The memory plan has room for the last logits of a prompt only.
    signature = inspect.signature(session.model.forward)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature.parameters else {}
    for start in range(0, len(ids), chunk):
        part = ids[None, start : start + chunk]  # [1, T]
        session.model(input_ids=part, past_key_values=cache, use_cache=True, **last_only)


def _make_cold(session: Session) -> None:
    """Empty the expert cache, except for pinned experts, and the page cache of the bundle.

    Reading pinned experts is part of opening a session: it happens before the timing starts.
    """
    session.empty_cache()
    session.runner.store.load_pinned()
    forget_pages(session.bundle.paths)


def forget_pages(paths: Iterable[Path]) -> None:
    """Empty the page cache of files.

    Raises:
        StorageError: one cannot be opened.
    """
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        try:
            os.fsync(handle)  # a page that waits to be written cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
