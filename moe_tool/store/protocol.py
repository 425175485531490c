"""Interface of the experts in memory, wherever and however they lie there."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.policies.eviction.protocol import Hint
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.channels import ChosenChannels, Selector
from moe_tool.quantization.weights import ExpertWeights, StoredExpert

Supply = Iterator[tuple[int, StoredExpert]]
"""(number, expert) of each expert of a call, valid until the iterator's next step"""
SelectChannels = Callable[[Selector], ChosenChannels]
"""Says which channels of an expert a call needs, by the expert's selector"""


class ExpertStore(Protocol):
    """A cache of the experts of a bundle, in F forms of E experts a layer.

    Experts of a layer are named by the numbers of `FormIds`: below E their primary forms. What a
    call evicts is settled when it starts, whatever order its reads arrive in; between two calls
    stand prefetches, which the next call keeps or strikes out. One thread calls everything.
    """

    @property
    def hints(self) -> frozenset[Hint]:
        """Hints that the eviction policy asks for beside the accesses"""

    def resident(self, layer: int) -> np.ndarray:
        """Return which forms of a layer are in memory now, [F, E] bool; pinned ones always are."""

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return which forms of a layer never leave, [F, E] bool."""

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read what never leaves and is not in memory yet, counted nowhere.

        Raises:
            CorruptArtifactError: a record does not have the bytes that the manifest promises.
            StorageError: the bundle cannot be read.
        """

    def select_channels(self, layer: int, experts: Sequence[int], select: SelectChannels) -> None:
        """Let the next call use no more of these experts than the channels that `select` names;
        experts that are not in channels are used whole."""

    def acquire(
        self,
        layer: int,
        numbers: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
    ) -> Supply:
        """Yield each expert: those in memory, then the others as they arrive.

        Reads start at once, in the order of `numbers`. A call that was left in the middle ends when
        the next one starts.

        Args:
            layer: decoder layer.
            numbers: distinct experts of the layer.
            counters: hits, misses, bytes_read, stall_seconds and the use of prefetches and channels
                are added to.
            scores: [E], `gate_scores` of the call, where `hints` has "scores".

        Raises:
            CorruptArtifactError: a record does not have the bytes that the manifest promises. The
                store stays usable, without that expert.
            StorageError: the bundle cannot be read; likewise.
        """

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

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        """Tell the eviction policy what a call to come is predicted to name, once the reads of the
        call under way have begun.

        Args:
            layer: decoder layer of the call to come.
            experts: predicted experts of that layer.
            ahead: 1 for the next call.
        """

    def close(self) -> None:
        """Stop reading, join the threads, give the memory back. Weights handed out are void."""


def on_host(supply: Supply) -> Iterator[tuple[int, ExpertWeights]]:
    """Yield each expert of a call in memory that the host's kernels can address."""
    for number, expert in supply:
        yield number, expert.to_host()
