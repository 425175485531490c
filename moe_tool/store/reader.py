"""Worker threads that read records into slots."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue

import torch

Read = Callable[[int, int, torch.Tensor], None]
"""(layer, expert, out [record size] uint8): fills `out` or raises."""
ExpertKey = tuple[int, int]
"""(layer, expert)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """The end of one read."""

    key: ExpertKey
    error: BaseException | None
    """What the read failed with; the memory then holds anything"""


class RecordReader:
    """Reads in the background; one consumer thread starts reads and takes arrivals."""

    def __init__(self, read: Read, *, n_readers: int) -> None:
        self._read = read
        self._threads = ThreadPoolExecutor(n_readers, thread_name_prefix="expert-reader")
        self._arrivals: SimpleQueue[tuple[ExpertKey, Future[None]]] = SimpleQueue()
        self._under_way: dict[ExpertKey, Future[None]] = {}

    @property
    def n_under_way(self) -> int:
        """Number of reads started whose arrival was not taken yet."""
        return len(self._under_way)

    def start(self, key: ExpertKey, out: torch.Tensor) -> None:
        """Read a record into `out`, which has to be left alone until the read arrives."""
        layer, expert = key
        arrivals = self._arrivals  # `stop` puts a new one in its place: nothing stale arrives there
        future = self._threads.submit(self._read, layer, expert, out)
        self._under_way[key] = future
        future.add_done_callback(lambda done: arrivals.put((key, done)))

    def next_arrival(self) -> Arrival:
        """Return the next read that ends, in order of arrival; waits for it."""
        assert self._under_way, "no read is under way"
        key, future = self._arrivals.get()
        del self._under_way[key]
        return Arrival(key=key, error=future.exception())

    def stop(self) -> list[ExpertKey]:
        """Give up the reads not begun, wait for the others; return the keys that were read."""
        under_way, self._under_way = self._under_way, {}
        for future in under_way.values():
            future.cancel()
        wait(under_way.values())
        self._arrivals = SimpleQueue()
        return [
            key
            for key, future in under_way.items()
            if not future.cancelled() and future.exception() is None
        ]

    def close(self) -> None:
        """Stop all reads, then join the threads."""
        self.stop()
        self._threads.shutdown(wait=True)
