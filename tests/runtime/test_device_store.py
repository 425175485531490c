"""Experts in memory that the host cannot address: a store of its own, and a whole run over it."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.policies.eviction import MakeEviction
from moe_tool.policies.eviction.protocol import Hint
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import ExpertWeights, StoredExpert
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.store.protocol import SelectChannels
from moe_tool.store.slot_book import SlotBook, require_slots

PROMPT = "The lighthouse keeper"


class _Buffer:
    """Device memory: neither a tensor nor an array, and copied to the host as a whole."""

    def __init__(self, record: torch.Tensor) -> None:
        self._bytes = bytes(record.numpy())

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the host cannot address this memory")

    numpy = data_ptr = __array__

    def copy_to_host(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self._bytes), dtype=torch.uint8)


class _OnDevice:
    """An expert of which the host sees nothing before it asks for a copy."""

    def __init__(self, buffer: _Buffer, decode: Callable[[torch.Tensor], ExpertWeights]) -> None:
        self._buffer, self._decode = buffer, decode

    def to_host(self) -> ExpertWeights:
        return self._decode(self._buffer.copy_to_host())


class DeviceStore:
    """An `ExpertStore` of one form whose slots are `_Buffer`s and whose reads are futures.

    A read fills a buffer of the host's, which is uploaded in the thread that read it. A read that
    was given up ends unseen.
    """

    def __init__(
        self,
        bundle: Any,
        *,
        form: int,
        n_slots: int,
        pinned: Sequence[ExpertKey] = (),
        eviction: MakeEviction,
        per_layer: bool = False,
    ) -> None:
        self._bundle, self._held = bundle, bundle.forms[form]
        shape, table = bundle.manifest.shape, self._held.table
        require_slots(shape, table, n_slots=n_slots, n_pinned=len(pinned), per_layer=per_layer)
        self._book = SlotBook(
            shape,
            n_slots=min(n_slots, len(table.records)),
            pinned=pinned,
            eviction=eviction,
            per_layer=per_layer,
        )
        self._memory: dict[ExpertKey, _Buffer] = {}
        self._reads: dict[ExpertKey, Future[_Buffer]] = {}
        self._prefetched: dict[ExpertKey, Future[_Buffer]] = {}
        self._later: dict[ExpertKey, ExpertKey] = {}
        """Expert of the call under way -> the one that gets its slot"""
        self._named: list[ExpertKey] = []
        self._call: Generator[tuple[int, StoredExpert], None, None] | None = None
        self._copies = ThreadPoolExecutor(2)

    @property
    def hints(self) -> frozenset[Hint]:
        return self._book.hints

    def resident(self, layer: int) -> np.ndarray:
        return self._book.resident(layer)

    def pinned_mask(self, layer: int) -> np.ndarray:
        return self._book.pinned_mask(layer)

    def load_pinned(self, progress: Progress = SILENT) -> None:
        self._end_call()
        missing = [key for key in self._book.pinned if key not in self._book.slot_of]
        for key in missing:
            self._book.take(key)
            self._reads[key] = self._copies.submit(self._upload, key)
        try:
            for key in missing:
                self._memory[key] = self._reads[key].result()
                del self._reads[key]
        finally:
            self._settle()

    def begin_sequence(self) -> None:
        self._book.begin_sequence()

    def select_channels(self, layer: int, experts: Sequence[int], select: SelectChannels) -> None:
        pass

    def acquire(
        self,
        layer: int,
        numbers: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
    ) -> Generator[tuple[int, StoredExpert], None, None]:
        self.load_pinned()
        wanted = [(layer, expert) for expert in numbers]
        for key, read in self._prefetched.items():
            if key in wanted:
                self._reads[key] = read
                counters.prefetch_hits += 1
            else:
                self._book.strike_out(key)
        prefetched, self._prefetched = set(self._prefetched), {}
        here = [key for key in wanted if key in self._book.slot_of]
        counters.hits += len(here)
        counters.misses += len(wanted) - len(here)
        for entry in self._book.access(layer, wanted, scores):
            key, _, victim = self._book.enter(entry)
            if victim in wanted and victim is not None:
                self._later[victim] = key  # its slot is free once the other one was computed
            else:
                self._evict(victim)
                self._reads[key] = self._copies.submit(self._upload, key)
        self._named = wanted
        self._call = self._supply(here, prefetched, counters)
        return self._call

    def _supply(
        self, here: list[ExpertKey], prefetched: set[ExpertKey], counters: PhaseCounters
    ) -> Generator[tuple[int, StoredExpert], None, None]:
        try:
            for key in here:
                if key not in self._reads:
                    yield key[1], _OnDevice(self._memory[key], self._held.form.decode)
                    self._free(key)
            while self._reads:
                done, _ = wait(self._reads.values(), return_when=FIRST_COMPLETED)
                for key in [key for key, read in self._reads.items() if read in done]:
                    self._memory[key] = self._reads[key].result()
                    del self._reads[key]
                    counters.bytes_read += self._held.record_size_bytes
                    if key in prefetched:
                        counters.prefetched_bytes += self._held.record_size_bytes
                    yield key[1], _OnDevice(self._memory[key], self._held.form.decode)
                    self._free(key)
        finally:
            self._settle()

    def _free(self, key: ExpertKey) -> None:
        follower = self._later.pop(key, None)
        if follower is not None:
            self._evict(key)
            self._reads[follower] = self._copies.submit(self._upload, follower)

    def prefetch(
        self, layer: int, numbers: Sequence[int], *, spare: Sequence[int], counters: PhaseCounters
    ) -> None:
        keys = [(layer, expert) for expert in numbers]
        held = [*self._named, *keys, *((layer, expert) for expert in spare)]
        for entry in self._book.prefetch(keys, held):
            key, _, victim = self._book.enter(entry)
            self._evict(victim)
            self._prefetched[key] = self._copies.submit(self._upload, key)
            counters.prefetches += 1

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        self._book.expect([(layer, expert) for expert in experts], ahead=ahead)

    def close(self) -> None:
        self._end_call()
        self._copies.shutdown(wait=True, cancel_futures=True)
        self._memory.clear()

    def _evict(self, key: ExpertKey | None) -> None:
        if key is not None:
            self._memory.pop(key, None)

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.close()
        self._settle()
        self._named = []

    def _settle(self) -> None:
        """Forget what a call asked for and never got."""
        for victim, key in self._later.items():
            self._evict(victim)
            self._book.strike_out(key)
        for key in self._reads:
            if key in self._book.slot_of:
                self._book.strike_out(key)
        self._later, self._reads = {}, {}

    def _upload(self, key: ExpertKey) -> _Buffer:
        staging = torch.empty(self._held.record_size_bytes, dtype=torch.uint8)
        self._bundle.read_record_into(*key, staging, form=self._held.index)
        return _Buffer(staging)


@pytest.mark.parametrize("prefetch", ["none", "next-layer"])
def test_a_run_over_a_device_gives_the_text_counts_and_bytes_of_one_in_slots(
    prefetch: str, tiny_bundle: Callable[..., Path]
) -> None:
    options = run_options(memory="50%", context=64, prompt_tokens=16, prefetch=prefetch)
    found = []
    for make_store in (None, _device_store):
        given = {} if make_store is None else {"make_store": make_store}
        with open_session(tiny_bundle("mixtral"), options, **given) as session:
            result = generate(session, PROMPT, GenerateOptions(max_tokens=12, raw=True))
            stats = session.runner.stats
            assert isinstance(session.runner.store, DeviceStore) is (make_store is not None)
        found.append((result.token_ids, stats.decode.hits, stats.decode.misses))
        assert stats.decode.misses > 0
    assert found[0] == found[1]


def _device_store(bundle: Any, rooms: Any, eviction: Any) -> DeviceStore:
    (room,) = rooms
    return DeviceStore(
        bundle,
        form=0,
        n_slots=room.n_slots,
        pinned=room.pinned,
        eviction=eviction.make,
        per_layer=eviction.per_layer,
    )


def test_the_memory_of_the_device_is_no_tensor() -> None:
    buffer = _Buffer(torch.zeros(4, dtype=torch.uint8))
    for addressing in (np.asarray, lambda b: b.numpy(), lambda b: b.data_ptr()):
        with pytest.raises(TypeError, match="cannot address"):
            addressing(buffer)
