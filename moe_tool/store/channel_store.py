"""Store of experts in channels: selectors stay in memory, slots are filled channel by channel."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.formats.bundle_reader import BundleReader, GoOn
from moe_tool.policies.eviction import Lru, MakeEviction
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.channels import ChannelExpert, ChannelWeight, ChosenChannels, Selector
from moe_tool.store.protocol import SelectChannels, Supply
from moe_tool.store.reader import Read
from moe_tool.store.record_store import RecordStore
from moe_tool.store.throttle import ThrottledDisk


class ChannelStore:
    """An `ExpertStore` of experts in channels, of which a call may want only some.

    A slot is laid out as a record: a channel is read to its own place and stays as long as the
    expert. An expert is resident from its first use, and later calls read only its missing
    channels. Eviction is a `RecordStore`'s, whatever channels were selected.
    """

    def __init__(
        self,
        bundle: BundleReader,
        *,
        form: int,
        n_slots: int,
        pinned: Sequence[ExpertKey] = (),
        eviction: MakeEviction,
        per_layer: bool = False,
        disk: ThrottledDisk | None = None,
    ) -> None:
        """Reserve the memory; nothing is read yet. See RecordStore; reads keep to the pace of
        `disk`, if there is one."""
        held = bundle.forms[form]
        (selectors,) = (
            each
            for each in bundle.forms
            if each.table.role == "selector" and each.table.precision == held.table.precision
        )
        keys = [(record.layer, record.expert) for record in selectors.table.records]
        self._bundle = bundle
        self._disk = disk
        self._held = held
        self._n_channels = held.form.layout.segments[0].shape[0]
        self._selector_form = selectors.form
        self._selectors = RecordStore(
            bundle,
            form=selectors.index,
            n_slots=len(keys),
            pinned=keys,
            eviction=Lru,
        )
        self._decoded: dict[ExpertKey, Selector] = {}
        self._selected: Mapping[int, ChosenChannels] = {}
        """Expert -> channels that the next call uses; all channels of experts not named"""
        self._wanted: Mapping[ExpertKey, np.ndarray] = {}
        """Expert -> channels that the current call reads; all channels of experts not named"""
        self._there: dict[ExpertKey, np.ndarray] = {}
        """Expert -> channels in its slot, [I] bool"""
        self._store = RecordStore(
            bundle,
            form=form,
            n_slots=n_slots,
            pinned=pinned,
            eviction=eviction,
            per_layer=per_layer,
            read=self._read,
        )
        self.hints = self._store.hints

    def resident(self, layer: int) -> np.ndarray:
        return self._store.resident(layer)

    def pinned_mask(self, layer: int) -> np.ndarray:
        return self._store.pinned_mask(layer)

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read the channel selectors, then the pinned experts."""
        self._selectors.load_pinned(progress)
        self._store.load_pinned(progress)

    def selector(self, layer: int, expert: int) -> Selector:
        """Return views of an expert's channel selector, which stays in memory."""
        key = (layer, expert)
        found = self._decoded.get(key)
        if found is None:
            self._selectors.load_pinned()
            record = self._selectors.record_of(key)
            assert record is not None
            found = self._selector_form.decode(record)
            self._decoded[key] = found
        return found

    def begin_sequence(self) -> None:
        self._store.begin_sequence()

    def select_channels(self, layer: int, experts: Sequence[int], select: SelectChannels) -> None:
        self._selected = {expert: select(self.selector(layer, expert)) for expert in experts}

    def acquire(
        self,
        layer: int,
        numbers: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
        elsewhere: Sequence[int] = (),
    ) -> Supply:
        for expert in numbers:
            self.selector(layer, expert)  # before a reader thread asks
        selected, self._selected = self._selected, {}
        self._wanted = {(layer, e): each.index.numpy() for e, each in selected.items()}
        n_misses = counters.misses
        supply = self._store.acquire(layer, numbers, counters, scores=scores, elsewhere=elsewhere)
        counters.whole_bytes += (counters.misses - n_misses) * self._held.record_size_bytes
        return self._supply(layer, supply, selected, counters)

    def prefetch(
        self, layer: int, numbers: Sequence[int], *, spare: Sequence[int], counters: PhaseCounters
    ) -> None:
        """Prefetch whole experts for the next call."""
        for expert in numbers:
            self.selector(layer, expert)
        self._store.prefetch(layer, numbers, spare=spare, counters=counters)

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        self._store.expect(layer, experts, ahead=ahead)

    def close(self) -> None:
        self._store.close()
        self._selectors.close()

    def _supply(
        self,
        layer: int,
        supply: Supply,
        selected: Mapping[int, ChosenChannels],
        counters: PhaseCounters,
    ) -> Supply:
        for expert, weights in supply:
            channels = cast(ChannelExpert, weights).channels
            found = ChannelExpert(channels, self.selector(layer, expert))
            found.chosen = selected.get(expert)
            key = (layer, expert)
            there = self._there[key]
            wanted = self._wanted.get(key)
            missing = np.flatnonzero(~there) if wanted is None else wanted[~there[wanted]]
            if len(missing):  # resident with other channels
                started = time.perf_counter()
                counters.bytes_read += self._add(key, channels, missing)
                counters.stall_seconds += time.perf_counter() - started
            counters.channels += self._n_channels
            counters.channels_used += self._n_channels if wanted is None else len(wanted)
            yield expert, found

    def _read(
        self,
        layer: int,
        expert: int,
        out: torch.Tensor,
        *,
        n_there: int = 0,
        go_on: GoOn | None = None,
    ) -> int | None:
        """Fill a slot with a whole record, or with the wanted channels."""
        key = (layer, expert)
        wanted = self._wanted.get(key)
        if wanted is None:
            read: Read = partial(self._bundle.read_record_into, form=self._held.index)
            if self._disk is not None:
                read = self._disk.slow_down(read)
            read(layer, expert, out, n_there=n_there, go_on=go_on)
            self._there[key] = np.ones(self._n_channels, dtype=bool)
            return None
        self._there[key] = np.zeros(self._n_channels, dtype=bool)
        return self._add(key, self._held.form.decode(out).channels, wanted)

    def _add(self, key: ExpertKey, weight: ChannelWeight, missing: np.ndarray) -> int:
        """Read channels to their places and return the bytes read."""
        hashes = self._decoded[key].hashes
        since = time.perf_counter()
        read = self._bundle.read_channels_into(*key, weight, missing, hashes=hashes)
        if self._disk is not None:
            self._disk.wait(read.n_bytes, since=since)
        self._there[key][read.channels] = True
        return read.n_bytes
