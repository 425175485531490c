"""Disk slowed down to a stated bandwidth and latency, so that a benchmark on a fast machine shows
what a slow one would."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from moe_tool.budget.sizes import format_bytes, parse_bytes
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import GoOn
from moe_tool.store.reader import Read

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_LATENCY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttle:
    """Speed of the disk that a run pretends to have."""

    bytes_per_s: float
    latency_s: float = 0.0
    """Time from a request to its first byte; requests under way at once share it"""

    def describe(self) -> str:
        latency = f" and {self.latency_s * 1e6:.0f} us a request" if self.latency_s else ""
        speed = format_bytes(self.bytes_per_s)
        return f"reads of experts and of rows of tables are slowed to {speed}/s{latency}"


def parse_throttle(text: str) -> Throttle:
    """Parse "200MB/s" or "200MB/s,100us".

    Raises:
        UsageError: it is no speed, or 0.
    """
    speed, _, latency = text.partition(",")
    matched = _LATENCY.fullmatch(latency)
    try:
        bytes_per_s = parse_bytes(speed.strip().removesuffix("/s"))
    except UsageError:
        bytes_per_s = 0
    if bytes_per_s <= 0 or (latency and matched is None):
        raise UsageError(
            f"--throttle {text} is not a disk's speed", hint="--throttle 200MB/s or 200MB/s,100us"
        )
    latency_s = 0.0 if matched is None else float(matched[1]) * _SECONDS[matched[2]]
    return Throttle(bytes_per_s=bytes_per_s, latency_s=latency_s)


@dataclass(slots=True, kw_only=True, eq=False)
class ThrottledDisk:
    """One slow disk, shared by all readers of a session: bytes pass one after the other.

    A read takes as long as the slow disk would need for it, or longer where the real one does.
    """

    speed: Throttle
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    _free_at: float = 0.0
    """Time at which the disk has passed every byte that was asked of it"""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, n_bytes: int, *, since: float, is_first: bool = True) -> None:
        """Wait until the slow disk would have passed `n_bytes` that were asked for at `since`;
        `is_first`: they begin a request."""
        with self._lock:
            begin = max(self._free_at, since)
            self._free_at = begin + n_bytes / self.speed.bytes_per_s
            end = self._free_at + (self.speed.latency_s if is_first else 0.0)
        if (left := end - self.clock()) > 0:
            self.sleep(left)

    @contextmanager
    def paced(self, n_bytes: int) -> Iterator[None]:
        """Let a read of `n_bytes` inside the block take as long as the slow disk needs for it."""
        since = self.clock()
        yield
        self.wait(n_bytes, since=since)

    def slow_down(self, read: Read) -> Read:
        """Return a function that reads as `read` does, at the slow disk's pace, piece by piece
        where a read can be cancelled."""

        def slow(
            layer: int,
            expert: int,
            out: torch.Tensor,
            *,
            n_there: int = 0,
            go_on: GoOn | None = None,
        ) -> int | None:
            since = self.clock()
            if go_on is None:
                n_bytes = read(layer, expert, out, n_there=n_there)
                self.wait(out.numel() - n_there if n_bytes is None else n_bytes, since=since)
                return n_bytes
            is_first = True

            def go_on_slowly(n_bytes: int) -> bool:
                nonlocal since, is_first
                self.wait(n_bytes, since=since, is_first=is_first)
                is_on = go_on(n_bytes)  # which may let other reads pass first
                since, is_first = self.clock(), False
                return is_on

            return read(layer, expert, out, n_there=n_there, go_on=go_on_slowly)

        return slow
