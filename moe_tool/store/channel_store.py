"""Experts in channels: what chooses them stays in memory, slots fill channel by channel."""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.formats.bundle_reader import BundleReader, GoOn
from moe_tool.formats.channel_record import decode_chooser
from moe_tool.formats.expert_form import ChannelForm
from moe_tool.policies.eviction import Lru, MakeEviction
from moe_tool.policies.eviction.protocol import Hint
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.channels import (
    ChannelExpert,
    ChannelWeight,
    Chooser,
    ChosenChannels,
)
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.store.expert_store import ExpertStore
from moe_tool.store.reader import ExpertKey


class ChannelStore:
    """An `ExpertStore` over records of channels, of which a call may want only some.

    A slot has the record's form: a chosen channel goes to its own place, and stays there as long as
    the expert does. So an expert is resident from its first use on, and of a resident one only
    those channels are read that were never wanted before. Who leaves is the `ExpertStore`'s affair,
    and does not depend on what was chosen.
    """

    def __init__(
        self,
        bundle: BundleReader,
        *,
        n_slots: int,
        pinned: Sequence[ExpertKey] = (),
        eviction: MakeEviction,
        per_layer: bool = False,
        n_readers: int = 2,
    ) -> None:
        """Reserve the memory; nothing is read yet. See ExpertStore."""
        level = bundle.chooser_level
        assert level is not None, "the bundle's experts are not in channels"
        records = bundle.levels[level].records
        self._bundle = bundle
        self._record_bytes = bundle.levels[PRIMARY].record_size_bytes
        self._form = bundle.levels[PRIMARY].form
        self._n_channels = self._form.layout.segments[0].shape[0]
        self._chooser_form = bundle.levels[level].form
        self._choosers = ExpertStore(
            bundle,
            level=level,
            n_slots=len(records),
            pinned=[(record.layer, record.expert) for record in records],
            eviction=Lru,
            n_readers=n_readers,
        )
        self._decoded: dict[ExpertKey, Chooser] = {}
        self._wanted: Mapping[ExpertKey, np.ndarray] = {}
        """Channels that the call under way has read; of an expert that is not named, all"""
        self._there: dict[ExpertKey, np.ndarray] = {}
        """[I] bool: what of an expert lies in its slot"""
        self._store = ExpertStore(
            bundle,
            n_slots=n_slots,
            pinned=pinned,
            eviction=eviction,
            per_layer=per_layer,
            n_readers=n_readers,
            read=self._read,
        )

    def resident(self, layer: int) -> np.ndarray:
        """Return which experts of a layer have a slot now, [E] bool."""
        return self._store.resident(layer)

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return which experts of a layer never leave, [E] bool."""
        return self._store.pinned_mask(layer)

    @property
    def hints(self) -> frozenset[Hint]:
        """What the eviction policy wants to be told."""
        return self._store.hints

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read what never leaves: what chooses channels, then pinned experts."""
        self._choosers.load_pinned(progress)
        self._store.load_pinned(progress)

    def chooser(self, layer: int, expert: int) -> Chooser:
        """Return what chooses an expert's channels; views of memory that stays."""
        key = (layer, expert)
        found = self._decoded.get(key)
        if found is None:
            self._choosers.load_pinned()
            record = self._choosers.record_of(key)
            form = self._chooser_form
            assert record is not None and isinstance(form, ChannelForm)
            found = decode_chooser(form.layout, record, form.shape, form.precision)
            self._decoded[key] = found
        return found

    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
        chosen: Mapping[int, ChosenChannels] | None = None,
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each expert with its weights, see ExpertStore.

        Args:
            layer: decoder layer.
            experts: distinct experts of the layer.
            counters: added to; bytes are those that were read.
            scores: of the call.
            chosen: expert -> the channels that will be used of it; None: all of all.
        """
        for expert in experts:
            self.chooser(layer, expert)  # before a reader thread asks
        chosen = chosen or {}
        self._wanted = {(layer, e): each.index.numpy() for e, each in chosen.items()}
        n_misses = counters.misses
        supply = self._store.acquire(layer, experts, counters, scores=scores)
        counters.whole_bytes += (counters.misses - n_misses) * self._record_bytes
        return self._supply(layer, supply, chosen, counters)

    def prefetch(
        self, layer: int, experts: Sequence[int], *, spare: Sequence[int], counters: PhaseCounters
    ) -> None:
        """Expect experts to be named by the next call, and read them whole."""
        for expert in experts:
            self.chooser(layer, expert)
        self._store.prefetch(layer, experts, spare=spare, counters=counters)

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        """Tell the eviction policy what a call to come is predicted to name."""
        self._store.expect(layer, experts, ahead=ahead)

    def close(self) -> None:
        """Stop reading and give the memory back."""
        self._store.close()
        self._choosers.close()

    def _supply(
        self,
        layer: int,
        supply: Iterator[tuple[int, ExpertWeights]],
        chosen: Mapping[int, ChosenChannels],
        counters: PhaseCounters,
    ) -> Iterator[tuple[int, ExpertWeights]]:
        for expert, weights in supply:
            assert isinstance(weights, ChannelExpert)
            found = ChannelExpert(weights.channels, self.chooser(layer, expert))
            found.chosen = chosen.get(expert)
            key = (layer, expert)
            there = self._there[key]
            wanted = self._wanted.get(key)
            missing = np.flatnonzero(~there) if wanted is None else wanted[~there[wanted]]
            if len(missing):  # it was resident, with other channels
                started = time.perf_counter()
                counters.bytes_read += self._add(key, weights.channels, missing)
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
        """Fill a slot with a whole record, or with the channels that are wanted."""
        key = (layer, expert)
        wanted = self._wanted.get(key)
        if wanted is None:
            self._bundle.read_record_into(layer, expert, out, n_there=n_there, go_on=go_on)
            self._there[key] = np.ones(self._n_channels, dtype=bool)
            return None
        self._there[key] = np.zeros(self._n_channels, dtype=bool)
        return self._add(key, self._channels(out), wanted)

    def _channels(self, record: torch.Tensor) -> ChannelWeight:
        found = self._form.decode(record)
        assert isinstance(found, ChannelExpert)
        return found.channels

    def _add(self, key: ExpertKey, weight: ChannelWeight, missing: np.ndarray) -> int:
        """Read channels to their places; return how many bytes that were."""
        hashes = self._decoded[key].hashes
        read = self._bundle.read_channels_into(*key, weight, missing, hashes=hashes)
        self._there[key][read.channels] = True
        return read.n_bytes
