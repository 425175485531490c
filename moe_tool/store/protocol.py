"""Interface of the stores of experts in memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.policies.eviction.protocol import Hint
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.channels import ChosenChannels, Selector
from moe_tool.quantization.weights import ExpertWeights, StoredExpert

Supply = Iterator[tuple[int, StoredExpert]]
"""Iterator over (number, expert) of a call; an expert is valid until the next step"""
SelectChannels = Callable[[Selector], ChosenChannels]
"""Function from an expert's selector to the channels that a call needs"""


class ExpertStore(Protocol):
    """A cache of the experts of a bundle, in F forms of E experts per layer.

    Experts of a layer are named by the numbers of `FormIds`; numbers below E are primary forms. A
    call's evictions are settled when it starts, in whatever order its reads arrive. The next call
    keeps or cancels the prefetches before it. One thread makes all calls.
    """

    @property
    def hints(self) -> frozenset[Hint]:
        """Hints that the eviction policy needs beside the accesses"""

    def resident(self, layer: int) -> np.ndarray:
        """Return which forms of a layer are in memory now, [F, E] bool; pinned ones always are."""

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return which forms of a layer never leave, [F, E] bool."""

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read the pinned experts that are not in memory yet, counted nowhere.

        Raises:
            CorruptArtifactError: a record does not have the bytes that the manifest promises.
            StorageError: the bundle cannot be read.
        """

    def begin_sequence(self) -> None:
        """Tell the eviction policy that a new sequence, or batch of sequences, begins with the next
        call."""

    def select_channels(self, layer: int, experts: Sequence[int], select: SelectChannels) -> None:
        """Restrict the next call to the channels that `select` chooses for these experts; experts
        that are not in channels are used whole."""

    def acquire(
        self,
        layer: int,
        numbers: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
        elsewhere: Sequence[int] = (),
    ) -> Supply:
        """Yield each expert: resident ones, then the others as they arrive.

        Reads start at once, in the order of `numbers`. A call that was abandoned ends when the next
        one starts.

        Args:
            layer: decoder layer.
            numbers: distinct experts of the layer.
            counters: hits, misses, bytes_read, stall_seconds and the use of prefetches and channels
                are updated.
            scores: [E], `gate_scores` of the call, if `hints` has "scores".
            elsewhere: experts of the layer that another store's form answers in this call, if
                `hints` has "other forms".

        Raises:
            CorruptArtifactError: a record does not have the bytes that the manifest promises. The
                store stays usable, without that expert.
            StorageError: the bundle cannot be read; likewise.
        """

    def prefetch(
        self, layer: int, numbers: Sequence[int], *, spare: Sequence[int], counters: PhaseCounters
    ) -> None:
        """Prefetch experts for the next call of a layer, while no demanded read is waiting.

        Slots are taken as the eviction policy says, never from the current call, a pinned
        expert, or one named to `prefetch` since it began; without a slot, the rest of `numbers` is
        not prefetched.
        The timing of reads does not change which experts are prefetched.

        Args:
            layer: decoder layer of that call, one or more after the current one.
            numbers: non-resident experts, the most wanted first; may be empty.
            spare: numbers of that layer's experts that stay if they are resident.
            counters: count prefetches; later calls count the bytes.
        """

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        """Tell the eviction policy the experts predicted for a coming call of a layer, once the
        reads of the current call have begun; `ahead` is 1 for the next call."""

    def close(self) -> None:
        """Stop reading, join the threads and free the memory, which invalidates all weights."""


def on_host(supply: Supply) -> Iterator[tuple[int, ExpertWeights]]:
    """Yield each expert of a call in memory that the host's kernels can address."""
    for number, expert in supply:
        yield number, expert.to_host()
