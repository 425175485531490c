"""Running means of what a read and the product of a cheaper form take in a session."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from moe_tool.formats.bundle_reader import GoOn
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.store.reader import Read

Supplied = Iterator[tuple[int, ExpertWeights]]


@dataclass(slots=True, kw_only=True, eq=False)
class MeasuredCosts:
    """Costs of both ways to answer a miss, as SMoE (arXiv:2508.18983) takes them.

    Reads that overlap share the disk: the mean is the time in which any was under way over their
    number. Prefetches are not counted.
    """

    clock: Callable[[], float] = time.perf_counter
    """Source of seconds"""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _n_running: int = 0
    _since: float = 0.0
    _reading_s: float = 0.0
    _n_reads: int = 0
    _product_s: float = 0.0
    _n_products: int = 0

    def means_ms(self) -> tuple[float, float] | None:
        """Return the mean milliseconds of a read and of a product; None before both happened."""
        with self._lock:
            if not self._n_reads or not self._n_products:
                return None
            return (
                1e3 * self._reading_s / self._n_reads,
                1e3 * self._product_s / self._n_products,
            )

    def time_reads(self, read: Read) -> Read:
        """Return a function that reads as `read` does and is timed where nothing can cancel it."""

        def timed(
            layer: int,
            expert: int,
            out: torch.Tensor,
            *,
            n_there: int = 0,
            go_on: GoOn | None = None,
        ) -> int | None:
            if go_on is not None:
                return read(layer, expert, out, n_there=n_there, go_on=go_on)
            self._begin()
            try:
                return read(layer, expert, out, n_there=n_there)
            finally:
                self._end()

        return timed

    def time_products(self, supplied: Supplied, is_timed: Callable[[int], bool]) -> Supplied:
        """Pass on a call's experts; the time until the next one is asked for is that of a product,
        counted for those numbers that `is_timed` names."""
        for number, weights in supplied:
            began = self.clock()
            yield number, weights
            if is_timed(number):
                with self._lock:
                    self._product_s += self.clock() - began
                    self._n_products += 1

    def _begin(self) -> None:
        with self._lock:
            if not self._n_running:
                self._since = self.clock()
            self._n_running += 1

    def _end(self) -> None:
        with self._lock:
            self._n_running -= 1
            self._n_reads += 1
            now = self.clock()
            self._reading_s += now - self._since
            self._since = now
