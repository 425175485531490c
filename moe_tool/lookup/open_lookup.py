"""A lookup bundle's model inside a memory budget, with its table on disk."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from moe_tool.allocator import return_freed_memory, trim
from moe_tool.artifacts.run_result import RunSetup
from moe_tool.available_memory import (
    anonymous_rss_bytes,
    available_memory_bytes,
    current_rss_bytes,
)
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.sizes import format_bytes
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.lookup.disk_rows import DiskRows, checked_model, load_model
from moe_tool.lookup.lookup_account import LookupAccount, account_for
from moe_tool.models.mole.load_mole import largest_bytes, skeleton_bytes
from moe_tool.models.mole.modeling import MoleForCausalLM
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.finite_logits import require_finite_logits
from moe_tool.runtime.first_use import first_use_bytes, use_torch_once
from moe_tool.store.throttle import Throttle, ThrottledDisk


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedLookup:
    """A loaded model, the table that it reads rows of, and the account of its memory."""

    bundle: LookupBundle
    model: MoleForCausalLM
    table: DiskRows
    account: LookupAccount


@contextmanager
def open_lookup(
    bundle: LookupBundle,
    *,
    memory: MemoryRequest | None,
    positions: int,
    threads: int | None,
    throttle: Throttle | None = None,
    beside: Mapping[str, int] = MappingProxyType({}),
    progress: Progress = SILENT,
) -> Iterator[OpenedLookup]:
    """Load a model into a budget, and close its table at the end of the block.

    A budget that is too small is refused before anything large is read. Sets torch's threads for
    the block.

    Args:
        bundle: the open bundle.
        memory: budget of the process; None: most of what is free.
        positions: prompt and generated tokens of the longest sequence.
        threads: compute threads; None: torch's.
        throttle: disk that rows seem to be read from.
        beside: bytes that the caller takes, by name.

    Raises:
        BudgetError, UsageError: as `account_for`.
        CorruptArtifactError, StorageError: as `load_model`.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        opened = _load(bundle, memory, positions, beside, progress)
        try:
            if throttle is not None:
                opened.table.rows.pace = ThrottledDisk(speed=throttle).paced
                progress.note(throttle.describe())
            yield opened
        finally:
            opened.table.rows.close()
    finally:
        torch.set_num_threads(threads_before)


def lookup_setup(opened: OpenedLookup) -> RunSetup:
    """Return the settings of an open bundle: every miss is fetched, and nothing stays."""
    return RunSetup(
        policy="exact",
        residency="none",
        eviction="none",
        prefetch="none",
        sparse_experts=None,
        activations="float32",
        table_bytes_on_disk=opened.bundle.manifest.table_bytes,
        threads=torch.get_num_threads(),
        memory_budget_bytes=opened.account.budget_bytes,
        slots=0,
    )


def _load(
    bundle: LookupBundle,
    memory: MemoryRequest | None,
    positions: int,
    beside: Mapping[str, int],
    progress: Progress,
) -> OpenedLookup:
    return_freed_memory()
    meta = checked_model(bundle)
    skeleton = skeleton_bytes(meta)
    largest = largest_bytes(meta)

    def account(process_bytes: int) -> LookupAccount:
        return account_for(
            memory,
            meta.config,
            positions=positions,
            process_bytes=process_bytes,
            skeleton_bytes=skeleton,
            loading_bytes=largest,
            available_bytes=anonymous_rss_bytes() + available_memory_bytes(),
            beside=beside,
        )

    use_torch_once()
    least = current_rss_bytes() + first_use_bytes(skeleton)
    account(least)
    progress.begin("load the skeleton", None, "")
    model, table = load_model(bundle)
    progress.end()
    model.register_forward_hook(partial(_require_finite, bundle.folder))
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
        trim()
        found = account(max(least, current_rss_bytes() - skeleton))
    except BaseException:
        table.rows.close()
        raise
    table.rows.bytes_read = 0
    size = format_bytes(bundle.manifest.table_bytes)
    progress.note(f"the experts' table stays on disk ({size}): rows are read as tokens need them")
    return OpenedLookup(bundle=bundle, model=model, table=table, account=found)


def _require_finite(folder: Path, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    require_finite_logits(output.logits, folder)
