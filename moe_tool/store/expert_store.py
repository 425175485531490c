"""The experts in memory: a cache of records over the bundle, read on worker threads."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import BudgetError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.policies.eviction import Entry, ExpertCache, MakeEviction
from moe_tool.policies.eviction.protocol import Hint
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.store.reader import Arrival, ExpertKey, Read, RecordReader
from moe_tool.store.slots import SlotPool


@dataclass(slots=True, kw_only=True)
class _Fetch:
    """One read of a layer call."""

    key: ExpertKey
    slot: int
    after: ExpertKey | None
    """The expert of the same call that has to be done with the slot before the read may start"""
    n_there: int = 0
    """Bytes that need not be read: the expert's base was in memory"""
    is_read: bool = False
    is_prefetched: bool = False
    """The read was begun by the call before"""


class ExpertStore:
    """A cache of experts in one pool of slots for all layers.

    What a layer call evicts is settled when it starts, by an `ExpertCache`: which read arrives
    first changes nothing, so the content after a call is that of a plain replay. Where a call names
    more experts than there are slots, its later reads wait until its earlier experts were computed.

    Between two calls stand prefetches: experts that the next call is expected to name. They take
    their slots when they are asked for, and count as resident from then on, read or not. The next
    call keeps those that it names, waiting where they are still to come, and strikes out the others
    as if they had never been there: the content is a plain replay again.

    One consumer thread calls everything; the reader threads touch nothing but the slots they fill.
    """

    def __init__(
        self,
        bundle: BundleReader,
        *,
        level: int = PRIMARY,
        n_slots: int,
        pinned: Sequence[ExpertKey] = (),
        eviction: MakeEviction,
        per_layer: bool = False,
        n_readers: int = 2,
        base: "ExpertStore | None" = None,
        read: Read | None = None,
    ) -> None:
        """Reserve the slots and start the readers; nothing is read yet.

        Args:
            bundle: stays open as long as the store; belongs to the caller.
            level: the form in which the store holds experts.
            n_slots: records that memory holds at once, pinned ones included.
            pinned: experts that never leave; read by `load_pinned`, at the latest with the first
                call.
            eviction: makes the policy of what is not pinned.
            per_layer: every layer has its own equal part of the slots that are not pinned.
            n_readers: worker threads.
            base: holds the first bits of nested experts: of one that is there only the rest is
                read.
            read: fills a slot; None: with the whole record, out of the bundle.

        Raises:
            BudgetError: the slots cannot hold the pinned experts and one more, or one per layer.
        """
        held = bundle.levels[level]
        n_all = len(held.records)
        pinned_keys = frozenset(pinned)
        n_read = 1 if level == PRIMARY else 0  # of replicas none need ever be read
        if n_slots < min(len(pinned_keys) + n_read, n_all) or n_slots < 1:
            raise BudgetError(
                f"{n_slots} expert slots cannot hold {len(pinned_keys)} pinned ones and one more",
                hint="give more --memory",
            )
        shape = bundle.manifest.shape
        n_slots = min(n_slots, n_all)
        capacity = n_slots - len(pinned_keys)
        if per_layer and 0 < capacity < len(shape.layers):
            raise BudgetError(
                f"{capacity} expert slots are not one for each of {len(shape.layers)} layers",
                hint="give more --memory, or leave per-layer out of --eviction",
            )
        self._shape = shape
        self._level = held
        self._base = base
        self._pinned = pinned_keys
        self._first_key = {layer: at * shape.experts for at, layer in enumerate(shape.layers)}
        self._position = {layer: at for at, layer in enumerate(shape.layers)}
        self._expert_of = [
            (layer, expert) for layer in shape.layers for expert in range(shape.experts)
        ]
        self._cache = ExpertCache(
            eviction,
            n_layers=len(shape.layers),
            n_experts=shape.experts,
            capacity=capacity,
            per_layer=per_layer,
            pinned=[self._key(key) for key in pinned_keys],
        )
        self._pinned_masks = {layer: self._empty_mask() for layer in shape.layers}
        for layer, expert in pinned_keys:
            self._pinned_masks[layer][expert] = True
        self._masks = {layer: mask.copy() for layer, mask in self._pinned_masks.items()}
        self._slots = SlotPool(n_slots=n_slots, slot_size_bytes=held.record_size_bytes)
        self._slot_of: dict[ExpertKey, int] = {}
        # Views of a slot, whatever record lies in it, with what a kernel prepares of them.
        self._decoded: dict[int, ExpertWeights] = {}
        self._reader = RecordReader(
            read or partial(bundle.read_record_into, level=level), n_readers=n_readers
        )
        self._is_pinned_read = not pinned_keys
        self._call: Iterator[tuple[int, ExpertWeights]] | None = None
        self._named: Sequence[ExpertKey] = ()  # by the call under way
        self._fetches: dict[ExpertKey, _Fetch] = {}  # of the call under way
        self._prefetches: dict[ExpertKey, int] = {}  # expert -> slot; for the call that comes next
        self._is_prefetching = False

    def _key(self, key: ExpertKey) -> int:
        """As the cache numbers experts."""
        return self._first_key[key[0]] + key[1]

    def _empty_mask(self) -> np.ndarray:
        return np.zeros(self._shape.experts, dtype=bool)

    def resident(self, layer: int) -> np.ndarray:
        """Return which experts of a layer are in memory now, [E] bool; pinned ones always are."""
        return self._masks[layer].copy()

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return which experts of a layer never leave, [E] bool."""
        return self._pinned_masks[layer].copy()

    @property
    def hints(self) -> frozenset[Hint]:
        """What the eviction policy wants to be told beside the accesses."""
        return self._cache.hints

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read the pinned experts that are not in memory yet, in file order, counted nowhere.

        Raises:
            CorruptArtifactError: a record does not have the bytes that the manifest promises.
            StorageError: the bundle cannot be read.
        """
        self._end_call()
        self._read_pinned(progress)

    def _read_pinned(self, progress: Progress) -> None:
        wanted = [(record.layer, record.expert) for record in self._level.records]
        missing = [key for key in wanted if key in self._pinned and key not in self._slot_of]
        if not missing:
            self._is_pinned_read = True
            return
        progress.begin("loading experts", len(missing), "experts")
        # Nothing else enters a slot before all of these have theirs.
        for key in missing:
            self._fetches[key] = _Fetch(key=key, slot=self._slots.take(), after=None)
        try:
            for fetch in self._fetches.values():
                self._slot_of[fetch.key] = fetch.slot
                self._start(fetch)
            while self._reader.n_under_way:
                self._take_arrival()
                progress.advance()
            self._is_pinned_read = True
        finally:
            self._settle()
            progress.end()

    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each expert with its weights: those in memory, then the others as they arrive.

        Reads start at once, in the order of `experts`. Weights are views of a slot, valid until the
        iterator's next step. A call that was left in the middle ends when the next one starts.

        Args:
            layer: decoder layer.
            experts: distinct experts of the layer.
            counters: hits, misses, bytes_read, stall_seconds and the use of prefetches are added
                to.
            scores: [E], `gate_scores` of the call, where `hints` has "scores".

        Raises:
            CorruptArtifactError: a record does not have the bytes that the manifest promises. The
                store stays usable, without that expert.
            StorageError: the bundle cannot be read; likewise.
        """
        self._end_call()
        if not self._is_pinned_read:
            self._read_pinned(SILENT)
        wanted = [(layer, expert) for expert in experts]
        assert len(set(experts)) == len(wanted), "an expert is named twice"
        if self._is_prefetching:
            self._judge_prefetches(wanted, counters)
        slot_of = self._slot_of
        present = {key: slot_of[key] for key in wanted if key in slot_of}
        n_misses = len(wanted) - len(present)
        counters.hits += len(present)
        counters.misses += n_misses
        self._cache.begin_call(self._position[layer], scores)
        entries = self._cache.access([self._key(key) for key in wanted])
        self._named = wanted
        if entries:
            self._plan(entries, named=set(wanted))
            for fetch in self._fetches.values():
                if fetch.after is None and not fetch.is_prefetched:
                    self._start(fetch)
        self._call = self._supply(present, counters)
        return self._call

    def prefetch(
        self, layer: int, experts: Sequence[int], *, spare: Sequence[int], counters: PhaseCounters
    ) -> None:
        """Expect experts to be named by the next call, and read them when nothing else is to be.

        Slots that others hold are taken as the eviction policy says, never from the call under way,
        a pinned expert, another prefetch or one of `spare`; where none is left, the rest of
        `experts` is not prefetched. The same calls prefetch the same, whatever the reads do.

        Args:
            layer: decoder layer of the next call.
            experts: not resident; the most wanted first.
            spare: experts of that layer that are to stay if they are resident.
            counters: prefetches are counted here, their bytes by the calls that follow.
        """
        self._is_prefetching = True
        first = self._first_key[layer]
        held = {self._key(key) for key in self._named}
        held.update(first + expert for expert in (*spare, *experts))
        assert not any((layer, expert) in self._slot_of for expert in experts), "one is resident"
        for entry in self._cache.prefetch([first + expert for expert in experts], held):
            key, slot = self._enter(entry)
            self._prefetches[key] = slot
            n_there = self._copy_base(key, slot)
            self._reader.prefetch(key, self._slots.view(slot), n_there=n_there)
            counters.prefetches += 1

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        """Tell the eviction policy what a call to come is predicted to name, once the reads of the
        call under way have begun.

        Args:
            layer: decoder layer of the call to come.
            experts: of that layer.
            ahead: 1 for the next call.
        """
        self._cache.expect([self._first_key[layer] + expert for expert in experts], ahead=ahead)

    def close(self) -> None:
        """Stop reading, join the threads, give the memory back. Weights handed out are void."""
        self._end_call()
        self._reader.close()
        self._slots.close()

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.close()  # type: ignore[attr-defined]  # a generator
        if self._fetches:  # it was never asked for its first expert
            self._settle()
        self._named = ()

    def _judge_prefetches(self, wanted: Sequence[ExpertKey], counters: PhaseCounters) -> None:
        """Keep the prefetches that a call names, strike out the others."""
        named = set(wanted)
        prefetches, self._prefetches = self._prefetches, {}
        for key, slot in prefetches.items():
            if key not in named:
                self._reader.drop(key)
                self._strike_out(key)
                continue
            counters.prefetch_hits += 1
            if not self._reader.claim(key):
                self._fetches[key] = _Fetch(key=key, slot=slot, after=None, is_prefetched=True)
        self._count_prefetched(counters)

    def _count_prefetched(self, counters: PhaseCounters) -> None:
        n_bytes = self._reader.take_prefetched_bytes()
        counters.prefetched_bytes += n_bytes
        counters.bytes_read += n_bytes

    def _supply(
        self, present: dict[ExpertKey, int], counters: PhaseCounters
    ) -> Iterator[tuple[int, ExpertWeights]]:
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

    def _plan(self, entries: Sequence[Entry], *, named: set[ExpertKey]) -> None:
        """Give every miss its slot, with the books as they will be afterwards."""
        for entry in entries:
            victim = None if entry.victim is None else self._expert_of[entry.victim]
            key, slot = self._enter(entry)
            after = victim if victim in named else None
            self._fetches[key] = _Fetch(key=key, slot=slot, after=after)

    def _enter(self, entry: Entry) -> tuple[ExpertKey, int]:
        key = self._expert_of[entry.key]
        if entry.victim is None:
            slot = self._slots.take()
        else:
            victim = self._expert_of[entry.victim]
            slot = self._slot_of.pop(victim)
            self._prefetches.pop(victim, None)
            self._masks[victim[0]][victim[1]] = False
        self._slot_of[key] = slot
        self._masks[key[0]][key[1]] = True
        return key, slot

    def _strike_out(self, key: ExpertKey) -> None:
        """Forget an expert whose record did not come."""
        self._slots.give(self._slot_of.pop(key))
        if key not in self._pinned:
            self._cache.discard(self._key(key))
            self._masks[key[0]][key[1]] = False

    def _start(self, fetch: _Fetch) -> None:
        fetch.n_there = self._copy_base(fetch.key, fetch.slot)
        self._reader.start(fetch.key, self._slots.view(fetch.slot), n_there=fetch.n_there)

    def _copy_base(self, key: ExpertKey, slot: int) -> int:
        """Copy an expert's first bits into its slot where they are in memory; return how many
        bytes that were."""
        held = None if self._base is None else self._base.record_of(key)
        view = self._slots.view(slot)
        if held is None or not self._reader.is_free(view):
            return 0
        view[: held.numel()] = held
        return held.numel()

    def record_of(self, key: ExpertKey) -> torch.Tensor | None:
        """Return an expert's record as it lies in its slot, uint8 [record size]; None where it is
        not in memory. It stays until the next call."""
        if key not in self._slot_of or key in self._fetches or key in self._prefetches:
            return None
        return self._slots.view(self._slot_of[key])

    def _start_after(self, key: ExpertKey, waiting: dict[ExpertKey, _Fetch]) -> None:
        fetch = waiting.pop(key, None)
        if fetch is not None:
            self._start(fetch)

    def _take_arrival(self) -> Arrival:
        arrival = self._reader.next_arrival()
        if arrival.error is not None:
            raise arrival.error
        self._fetches[arrival.key].is_read = True
        return arrival

    def _settle(self) -> None:
        """Let no demanded read run on, and strike from the books what was never read."""
        fetches, self._fetches = self._fetches, {}
        for key in self._reader.stop():
            fetches[key].is_read = True
        for key, fetch in fetches.items():
            if not fetch.is_read and self._slot_of.get(key) == fetch.slot:
                self._strike_out(key)

    def _weights(self, slot: int) -> ExpertWeights:
        weights = self._decoded.get(slot)
        if weights is None:
            weights = self._level.form.decode(self._slots.view(slot))
            self._decoded[slot] = weights
        return weights
