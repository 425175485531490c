"""Store of whole records of one size: a cache over the bundle, read on worker threads."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.policies.eviction import Entry, MakeEviction
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.store.protocol import SelectChannels, Supply
from moe_tool.store.reader import Job, Read, RecordReader
from moe_tool.store.slot_book import SlotBook, require_slots
from moe_tool.store.slots import SlotPool


@dataclass(slots=True, kw_only=True)
class _Fetch:
    """One read of a layer call."""

    key: ExpertKey
    slot: int
    after: ExpertKey | None
    """Expert of the same call whose computation frees the slot before the read may start"""
    is_read: bool = False
    is_prefetched: bool = False
    """Whether the read began as a prefetch"""


class RecordStore:
    """An `ExpertStore` of one form: a pool of slots for all layers, each with a whole record.

    A `SlotBook` settles a call's evictions when the call starts: the order in which reads arrive
    changes nothing, so that the content after a call is that of a plain replay. If a call names
    more experts than there are slots, later reads wait until earlier experts were computed.

    Prefetches take their slots when they are requested and count as resident from then on, read or
    not. The next call of their layer keeps those that it names, waiting for unfinished ones, and
    removes the others as if they had never been there: the content is that of a plain replay again.

    One consumer thread makes all calls; the reader threads touch nothing but the slots they fill.
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
        n_readers: int = 2,
        base: "RecordStore | None" = None,
        read: Read | None = None,
    ) -> None:
        """Reserve the slots and start the readers; nothing is read yet.

        Args:
            bundle: stays open as long as the store; belongs to the caller.
            form: position among `bundle.forms` of the form that the store holds.
            n_slots: records in memory at once, pinned ones included.
            pinned: experts that never leave; read with the first call at the latest.
            eviction: factory of the eviction policy of unpinned experts.
            per_layer: every layer has its own equal part of the slots that are not pinned.
            n_readers: worker threads.
            base: store of nested experts' bases; only the rest of a resident base's record is read.
            read: function that fills a slot; None: with the whole record from the bundle.

        Raises:
            BudgetError: the slots cannot hold the pinned experts and one more, or one per layer.
        """
        self._held = bundle.forms[form]
        shape, table, n_pinned = bundle.manifest.shape, self._held.table, len(frozenset(pinned))
        require_slots(shape, table, n_slots=n_slots, n_pinned=n_pinned, per_layer=per_layer)
        n_slots = min(n_slots, len(table.records))
        self._book = SlotBook(
            shape, n_slots=n_slots, pinned=pinned, eviction=eviction, per_layer=per_layer
        )
        self.hints = self._book.hints
        self._base = base
        self._slots = SlotPool(n_slots=n_slots, slot_size_bytes=self._held.record_size_bytes)
        self._decoded: dict[int, ExpertWeights] = {}
        """Slot -> views of its memory, valid for every record there, with prepared kernel data"""
        self._reader = RecordReader(
            read or partial(bundle.read_record_into, form=form), n_readers=n_readers
        )
        self._is_pinned_read = not n_pinned
        self._call: Supply | None = None
        self._named: Sequence[ExpertKey] = ()
        """Experts of the current call"""
        self._fetches: dict[ExpertKey, _Fetch] = {}
        """Reads of the current call"""
        self._prefetches: dict[ExpertKey, int] = {}
        """Expert -> slot, for the next call of its layer"""
        self._spared: set[ExpertKey] = set()
        """Experts that no prefetch of the current call may evict"""
        self._is_prefetching = False

    def resident(self, layer: int) -> np.ndarray:
        return self._book.resident(layer)

    def pinned_mask(self, layer: int) -> np.ndarray:
        return self._book.pinned_mask(layer)

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read the pinned experts that are not in memory yet, in file order; see ExpertStore."""
        self._end_call()
        pinned, slot_of = self._book.pinned, self._book.slot_of
        keys = [(record.layer, record.expert) for record in self._held.table.records]
        missing = [key for key in keys if key in pinned and key not in slot_of]
        if not missing:
            self._is_pinned_read = True
            return
        progress.begin("loading experts", len(missing), "experts")
        # No other expert enters a slot before all pinned ones have theirs.
        for key in missing:
            self._fetches[key] = _Fetch(key=key, slot=self._book.take(key), after=None)
        try:
            for fetch in self._fetches.values():
                self._start(fetch)
            while self._reader.n_under_way:
                self._take_arrival()
                progress.advance()
            self._is_pinned_read = True
        finally:
            self._settle()
            progress.end()

    def begin_sequence(self) -> None:
        self._book.begin_sequence()

    def select_channels(self, layer: int, experts: Sequence[int], select: SelectChannels) -> None:
        """Do nothing: the experts are whole."""

    def acquire(
        self,
        layer: int,
        numbers: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
        elsewhere: Sequence[int] = (),
    ) -> Supply:
        self._end_call()
        if not self._is_pinned_read:
            self.load_pinned()
        wanted = [(layer, expert) for expert in numbers]
        assert len(set(numbers)) == len(wanted), "an expert is named twice"
        if self._is_prefetching:
            self._judge_prefetches(layer, wanted, counters)
        slot_of = self._book.slot_of
        present = {key: slot_of[key] for key in wanted if key in slot_of}
        counters.hits += len(present)
        counters.misses += len(wanted) - len(present)
        entries = self._book.access(layer, wanted, scores, elsewhere)
        self._named = wanted
        if entries:
            named = set(wanted)
            for entry in entries:
                key, slot, victim = self._enter(entry)
                after = victim if victim in named else None
                self._fetches[key] = _Fetch(key=key, slot=slot, after=after)
            for fetch in self._fetches.values():
                if fetch.after is None and not fetch.is_prefetched:
                    self._start(fetch)
        self._call = self._supply(present, counters)
        return self._call

    def prefetch(
        self, layer: int, numbers: Sequence[int], *, spare: Sequence[int], counters: PhaseCounters
    ) -> None:
        self._is_prefetching = True
        wanted = [(layer, expert) for expert in numbers]
        self._spared |= {*self._named, *wanted, *((layer, expert) for expert in spare)}
        assert not any(key in self._book.slot_of for key in wanted), "one is resident"
        for entry in self._book.prefetch(wanted, self._spared):
            key, slot, _ = self._enter(entry)
            self._prefetches[key] = slot
            n_there = self._copy_base(key, slot)
            self._reader.prefetch(key, self._slots.view(slot), n_there=n_there)
            counters.prefetches += 1

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        self._book.expect([(layer, expert) for expert in experts], ahead=ahead)

    def close(self) -> None:
        self._end_call()
        self._reader.close()
        self._slots.close()

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.close()  # type: ignore[attr-defined]  # a generator
        if self._fetches:  # the iterator was never advanced
            self._settle()
        self._named = ()
        self._spared = set()

    def _enter(self, entry: Entry) -> tuple[ExpertKey, int, ExpertKey | None]:
        """Enter an expert in the book; cancel the prefetch of a later layer that leaves for it."""
        key, slot, victim = self._book.enter(entry)
        if victim is not None and self._prefetches.pop(victim, None) is not None:
            self._reader.drop(victim)
        return key, slot, victim

    def _judge_prefetches(
        self, layer: int, wanted: Sequence[ExpertKey], counters: PhaseCounters
    ) -> None:
        """Keep a layer's prefetches that its call names and cancel its others."""
        named = set(wanted)
        judged = [key for key in self._prefetches if key[0] == layer]
        for key in judged:
            slot = self._prefetches.pop(key)
            if key not in named:
                self._reader.drop(key)
                self._book.strike_out(key)
                continue
            counters.prefetch_hits += 1
            if not self._reader.claim(key):
                self._fetches[key] = _Fetch(key=key, slot=slot, after=None, is_prefetched=True)
        self._count_prefetched(counters)

    def _count_prefetched(self, counters: PhaseCounters) -> None:
        n_bytes = self._reader.take_prefetched_bytes()
        counters.prefetched_bytes += n_bytes
        counters.bytes_read += n_bytes

    def _supply(self, present: dict[ExpertKey, int], counters: PhaseCounters) -> Supply:
        fetches = self._fetches
        waiting = {fetch.after: fetch for fetch in fetches.values() if fetch.after is not None}
        try:
            for key, slot in present.items():
                if key in fetches:
                    continue  # prefetched, but not there yet
                yield key[1], self._weights(slot)
                if waiting:
                    self._start_after(key, waiting)
            while self._reader.n_under_way:
                started = time.perf_counter()
                arrival = self._take_arrival()
                fetch = self._fetches[arrival.key]
                counters.stall_seconds += time.perf_counter() - started
                if fetch.is_prefetched:
                    self._count_prefetched(counters)
                else:
                    counters.bytes_read += arrival.n_bytes
                yield fetch.key[1], self._weights(fetch.slot)
                self._start_after(fetch.key, waiting)
        finally:
            self._settle()

    def _start(self, fetch: _Fetch) -> None:
        n_there = self._copy_base(fetch.key, fetch.slot)
        self._reader.start(fetch.key, self._slots.view(fetch.slot), n_there=n_there)

    def _copy_base(self, key: ExpertKey, slot: int) -> int:
        """Copy an expert's base into its slot if it is resident, and return the bytes copied."""
        held = None if self._base is None else self._base.record_of(key)
        view = self._slots.view(slot)
        if held is None or not self._reader.is_free(view):
            return 0
        view[: held.numel()] = held
        return held.numel()

    def record_of(self, key: ExpertKey) -> torch.Tensor | None:
        """Return an expert's record in its slot, uint8 [record size], valid until the next call;
        None if it is not resident."""
        slot = self._book.slot_of.get(key)
        if slot is None or key in self._fetches or key in self._prefetches:
            return None
        return self._slots.view(slot)

    def _start_after(self, key: ExpertKey, waiting: dict[ExpertKey, _Fetch]) -> None:
        if fetch := waiting.pop(key, None):
            self._start(fetch)

    def _take_arrival(self) -> Job:
        arrival = self._reader.next_arrival()
        if arrival.error is not None:
            raise arrival.error
        self._fetches[arrival.key].is_read = True
        return arrival

    def _settle(self) -> None:
        """Stop the demanded reads, and remove unread experts from the slot book."""
        fetches, self._fetches = self._fetches, {}
        for key in self._reader.stop():
            fetches[key].is_read = True
        for key, fetch in fetches.items():
            if not fetch.is_read and self._book.slot_of.get(key) == fetch.slot:
                self._book.strike_out(key)

    def _weights(self, slot: int) -> ExpertWeights:
        weights = self._decoded.get(slot)
        if weights is None:
            weights = self._held.form.decode(self._slots.view(slot))
            self._decoded[slot] = weights
        return weights
