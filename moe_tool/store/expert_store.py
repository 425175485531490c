"""The experts in memory: a cache of records over the bundle, read on worker threads."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import BudgetError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.expert_record import decode_record
from moe_tool.policies.eviction.protocol import Eviction
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.store.reader import ExpertKey, RecordReader
from moe_tool.store.slots import SlotPool

Weights = dict[str, FloatWeight | IntegerWeight]


@dataclass(slots=True, kw_only=True)
class _Fetch:
    """One read of a layer call."""

    key: ExpertKey
    slot: int
    after: ExpertKey | None
    """The expert of the same call that has to be done with the slot before the read may start"""
    is_read: bool = False


class ExpertStore:
    """A cache of experts in one pool of slots for all layers.

    What a layer call evicts is settled when it starts, in the order in which it names its experts:
    hits are touched, then each miss takes a free slot or the victim's. Which read arrives first
    changes nothing, so the content after a call is that of a plain replay. Where a call names more
    experts than there are slots, its later reads wait until its earlier experts were computed.

    One consumer thread calls everything; the reader threads touch nothing but the slots they fill.
    """

    def __init__(
        self,
        bundle: BundleReader,
        *,
        n_slots: int,
        pinned: Sequence[ExpertKey] = (),
        eviction: Eviction,
        n_readers: int = 2,
    ) -> None:
        """Reserve the slots and start the readers; nothing is read yet.

        Args:
            bundle: stays open as long as the store; belongs to the caller.
            n_slots: records that memory holds at once, pinned ones included.
            pinned: experts that never leave; read by `load_pinned`, at the latest with the first
                call. eviction: a fresh policy; belongs to the store from now on. n_readers: worker
                threads.

        Raises:
            BudgetError: the slots cannot hold the pinned experts and one more.
        """
        manifest = bundle.manifest
        n_all = len(manifest.records)
        pinned_keys = frozenset(pinned)
        if n_slots < min(len(pinned_keys) + 1, n_all) or n_slots < 1:
            raise BudgetError(
                f"{n_slots} expert slots cannot hold {len(pinned_keys)} pinned ones and one more",
                hint="give more --memory",
            )
        self._bundle = bundle
        self._pinned = pinned_keys
        self._pinned_masks = {layer: self._empty_mask() for layer in manifest.shape.layers}
        for layer, expert in pinned_keys:
            self._pinned_masks[layer][expert] = True
        self._masks = {layer: mask.copy() for layer, mask in self._pinned_masks.items()}
        self._eviction = eviction
        self._slots = SlotPool(
            n_slots=min(n_slots, n_all), slot_size_bytes=manifest.record_size_bytes
        )
        self._slot_of: dict[ExpertKey, int] = {}
        self._decoded: dict[int, Weights] = {}  # views of a slot, whatever record lies in it
        self._reader = RecordReader(bundle.read_record_into, n_readers=n_readers)
        self._call: Iterator[tuple[int, Weights]] | None = None

    def _empty_mask(self) -> np.ndarray:
        return np.zeros(self._bundle.manifest.shape.experts, dtype=bool)

    def resident(self, layer: int) -> np.ndarray:
        """Return which experts of a layer are in memory now, [E] bool; pinned ones always are."""
        return self._masks[layer].copy()

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return which experts of a layer never leave, [E] bool."""
        return self._pinned_masks[layer].copy()

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read the pinned experts that are not in memory yet, in file order, counted nowhere.

        Raises:
            CorruptArtifactError: a record does not have the bytes that the manifest promises.
            StorageError: the bundle cannot be read.
        """
        self._end_call()
        self._read_pinned(progress)

    def _read_pinned(self, progress: Progress) -> None:
        records = self._bundle.manifest.records
        wanted = [(record.layer, record.expert) for record in records]
        missing = [key for key in wanted if key in self._pinned and key not in self._slot_of]
        if not missing:
            return
        progress.begin("loading experts", len(missing), "experts")
        # Nothing else enters a slot before all of these have theirs.
        fetches = {key: _Fetch(key=key, slot=self._slots.take(), after=None) for key in missing}
        try:
            for fetch in fetches.values():
                self._slot_of[fetch.key] = fetch.slot
                self._reader.start(fetch.key, self._slots.view(fetch.slot))
            while self._reader.n_under_way:
                self._take_arrival(fetches)
                progress.advance()
        finally:
            self._settle(fetches)
            progress.end()

    def acquire(
        self, layer: int, experts: Sequence[int], counters: PhaseCounters
    ) -> Iterator[tuple[int, Weights]]:
        """Yield each expert with its weights: those in memory, then the others as they arrive.

        Reads start with the first step of the iterator, before anything is yielded. Weights are
        views of a slot, valid until the iterator's next step. A call that was left in the middle
        ends when the next one starts.

        Args:
            layer: decoder layer.
            experts: distinct experts of the layer.
            counters: hits, misses, bytes_read and stall_seconds are added to.

        Raises:
            CorruptArtifactError: a record does not have the bytes that the manifest promises. The
                store stays usable, without that expert.
            StorageError: the bundle cannot be read; likewise.
        """
        self._end_call()
        self._call = self._supply([(layer, expert) for expert in experts], counters)
        return self._call

    def close(self) -> None:
        """Stop reading, join the threads, give the memory back. Weights handed out are void."""
        self._end_call()
        self._reader.close()
        self._slots.close()

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.close()  # type: ignore[attr-defined]  # a generator

    def _supply(
        self, wanted: Sequence[ExpertKey], counters: PhaseCounters
    ) -> Iterator[tuple[int, Weights]]:
        assert len(set(wanted)) == len(wanted), "an expert is named twice"
        if not self._pinned <= self._slot_of.keys():
            self._read_pinned(SILENT)
        present = {key: self._slot_of[key] for key in wanted if key in self._slot_of}
        counters.hits += len(present)
        counters.misses += len(wanted) - len(present)
        fetches = self._plan(wanted, present)
        waiting = {fetch.after: fetch for fetch in fetches.values() if fetch.after is not None}
        try:
            for fetch in fetches.values():
                if fetch.after is None:
                    self._reader.start(fetch.key, self._slots.view(fetch.slot))
            for key, slot in present.items():
                yield key[1], self._weights(slot)
                self._start_after(key, waiting)
            while self._reader.n_under_way:
                started = time.perf_counter()
                fetch = self._take_arrival(fetches)
                counters.stall_seconds += time.perf_counter() - started
                counters.bytes_read += self._bundle.manifest.record_size_bytes
                yield fetch.key[1], self._weights(fetch.slot)
                self._start_after(fetch.key, waiting)
        finally:
            self._settle(fetches)

    def _plan(
        self, wanted: Sequence[ExpertKey], present: dict[ExpertKey, int]
    ) -> dict[ExpertKey, _Fetch]:
        """Settle which slot every miss takes, with the cache's books as they will be afterwards."""
        for key in present:
            if key not in self._pinned:
                self._eviction.touch(key)
        named = set(wanted)
        fetches: dict[ExpertKey, _Fetch] = {}
        for key in wanted:
            if key in present:
                continue
            victim = None
            if self._slots.n_free:
                slot = self._slots.take()
            else:
                victim = self._eviction.victim(())
                slot = self._slot_of[victim]
                self._forget(victim)
            self._eviction.add(key)
            self._slot_of[key] = slot
            self._masks[key[0]][key[1]] = True
            fetches[key] = _Fetch(key=key, slot=slot, after=victim if victim in named else None)
        return fetches

    def _forget(self, key: ExpertKey) -> None:
        del self._slot_of[key]
        if key not in self._pinned:
            self._eviction.remove(key)
            self._masks[key[0]][key[1]] = False

    def _start_after(self, key: ExpertKey, waiting: dict[ExpertKey, _Fetch]) -> None:
        fetch = waiting.pop(key, None)
        if fetch is not None:
            self._reader.start(fetch.key, self._slots.view(fetch.slot))

    def _take_arrival(self, fetches: dict[ExpertKey, _Fetch]) -> _Fetch:
        arrival = self._reader.next_arrival()
        if arrival.error is not None:
            raise arrival.error
        fetch = fetches[arrival.key]
        fetch.is_read = True
        return fetch

    def _settle(self, fetches: dict[ExpertKey, _Fetch]) -> None:
        """Let no read run on, and strike from the books what was never read."""
        for key in self._reader.stop():
            fetches[key].is_read = True
        for key, fetch in fetches.items():
            if not fetch.is_read and key in self._slot_of:
                self._forget(key)
                self._slots.give(fetch.slot)

    def _weights(self, slot: int) -> Weights:
        weights = self._decoded.get(slot)
        if weights is None:
            manifest = self._bundle.manifest
            weights = decode_record(
                self._bundle.layout,
                self._slots.view(slot),
                manifest.precision,
                manifest.shape.expert_tensors,
            )
            self._decoded[slot] = weights
        return weights
