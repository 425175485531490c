"""Worker threads that read records into slots, demanded reads before prefetches."""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal, Protocol

import torch

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.formats.bundle_reader import GoOn


class Read(Protocol):
    """Function that reads a record into memory."""

    def __call__(
        self,
        layer: int,
        expert: int,
        out: torch.Tensor,
        *,
        n_there: int = 0,
        go_on: GoOn | None = None,
    ) -> int | None:
        """Fill `out`, uint8 [record size], whose first `n_there` bytes are valid, or raise; `go_on`
        is asked after each piece. Returns the bytes read; None: all missing ones."""


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One read of a record."""

    key: ExpertKey
    out: torch.Tensor
    n_there: int
    is_prefetch: bool
    arrivals: SimpleQueue["Job"] | None
    """Queue for the finished job; None: a prefetch that nobody waits for"""
    state: Literal["queued", "running", "done"] = "queued"
    is_dropped: bool = False
    n_bytes: int = 0
    """Bytes of a finished read"""
    error: BaseException | None = None
    """Failure of the read, after which the memory holds anything; None: success"""
    end: threading.Event = field(default_factory=threading.Event)


class RecordReader:
    """Background reader, called by one consumer thread.

    Demanded records are read in order. Prefetches run one at a time, begin only while no demanded
    read is queued or running, and are read piece by piece: after each piece a dropped one stops,
    and any other waits until no demanded read is queued or running. Its thread reads the demanded
    records meanwhile, so that they have all readers.
    """

    def __init__(self, read: Read, *, n_readers: int) -> None:
        self._read = read
        self._threads = ThreadPoolExecutor(n_readers, thread_name_prefix="expert-reader")
        # Over the queues, the jobs' states, and the byte count; notified of every change.
        self._lock = threading.Condition()
        self._demanded: deque[Job] = deque()
        self._hoped_for: deque[Job] = deque()
        self._running: list[Job] = []
        self._prefetched_bytes = 0
        # Used by the consumer thread alone:
        self._arrivals: SimpleQueue[Job] = SimpleQueue()
        self._under_way: dict[ExpertKey, Job] = {}
        self._prefetches: dict[ExpertKey, Job] = {}

    @property
    def n_under_way(self) -> int:
        """Number of demanded reads whose arrival has not been taken."""
        return len(self._under_way)

    def is_free(self, out: torch.Tensor) -> bool:
        """Return whether no cancelled read still writes to `out`."""
        with self._lock:
            return all(job.out.data_ptr() != out.data_ptr() for job in self._running)

    def start(self, key: ExpertKey, out: torch.Tensor, *, n_there: int = 0) -> None:
        """Start to read a record into `out`, uint8 [record size], unused until the read arrives;
        its first `n_there` bytes are valid already."""
        job = Job(key=key, out=out, n_there=n_there, is_prefetch=False, arrivals=self._arrivals)
        self._under_way[key] = job
        with self._lock:
            self._demanded.append(job)
            self._lock.notify_all()
        self._threads.submit(self._work)

    def prefetch(self, key: ExpertKey, out: torch.Tensor, *, n_there: int = 0) -> None:
        """Read a record while no demanded read waits, until `claim` or `drop`."""
        job = Job(key=key, out=out, n_there=n_there, is_prefetch=True, arrivals=None)
        self._prefetches[key] = job
        with self._lock:
            self._hoped_for.append(job)
        self._threads.submit(self._work)

    def claim(self, key: ExpertKey) -> bool:
        """Turn a prefetch into a demanded read.

        Returns:
            Whether the record is there already; if not, it arrives later, possibly with an error.
        """
        job = self._prefetches.pop(key)
        with self._lock:
            if job.state == "done" and job.error is None:
                return True
            job.arrivals = self._arrivals
            if job.state == "queued":
                self._hoped_for.remove(job)
                self._demanded.append(job)
            elif job.state == "done":
                self._arrivals.put(job)
            self._lock.notify_all()
        self._under_way[key] = job
        self._threads.submit(self._work)
        return False

    def drop(self, key: ExpertKey) -> None:
        """Cancel a prefetch. A new read into its memory may start at once: it waits for the current
        piece."""
        job = self._prefetches.pop(key)
        with self._lock:
            job.is_dropped = True
            if job.state == "queued":
                self._hoped_for.remove(job)
            self._lock.notify_all()

    def take_prefetched_bytes(self) -> int:
        """Return the bytes read by prefetches, claimed ones included, since the last call."""
        with self._lock:
            count, self._prefetched_bytes = self._prefetched_bytes, 0
        return count

    def next_arrival(self) -> Job:
        """Wait for the next demanded read to finish and return it."""
        assert self._under_way, "no read is under way"
        job = self._arrivals.get()
        del self._under_way[job.key]
        return job

    def stop(self) -> list[ExpertKey]:
        """Cancel queued demanded reads, wait for running ones and return their keys."""
        if not self._under_way:
            return []
        under_way, self._under_way = self._under_way, {}
        with self._lock:
            self._demanded.clear()
            self._lock.notify_all()
            begun = [job for job in under_way.values() if job.state != "queued"]
        for job in begun:
            job.end.wait()
        self._arrivals = SimpleQueue()
        return [job.key for job in begun if job.error is None]

    def close(self) -> None:
        """Stop all reads, then join the threads."""
        for key in list(self._prefetches):
            self.drop(key)
        self.stop()
        self._threads.shutdown(wait=True)

    def _work(self) -> None:
        """Run jobs while one may begin."""
        while (job := self._next_job()) is not None:
            self._complete(job)

    def _complete(self, job: Job) -> None:
        try:
            self._run(job)
        except BaseException as error:  # raised by the consumer with the arrival
            job.error = error
        with self._lock:
            self._running.remove(job)
            job.state = "done"
            if job.arrivals is not None:
                job.arrivals.put(job)
            self._lock.notify_all()
        job.end.set()

    def _next_job(self) -> Job | None:
        with self._lock:
            job = self._next_demanded()
            if job is not None or self._demanded or self._running or not self._hoped_for:
                return job
            job = self._hoped_for.popleft()
            job.state = "running"
            self._running.append(job)
        return job

    def _next_demanded(self) -> Job | None:
        """Begin the next demanded read whose memory is free; the lock is held."""
        # Memory of a dropped prefetch stays busy until its worker is done with it.
        busy = {each.out.data_ptr() for each in self._running if each.is_dropped}
        job = next((job for job in self._demanded if job.out.data_ptr() not in busy), None)
        if job is not None:
            self._demanded.remove(job)
            job.state = "running"
            self._running.append(job)
        return job

    def _give_way(self, prefetch: Job) -> bool:
        """Read what is demanded and wait for the other readers, unless the prefetch is demanded
        itself by now or dropped; return whether it goes on."""
        while True:
            with self._lock:
                while True:
                    if prefetch.is_dropped or prefetch.arrivals is not None:
                        return not prefetch.is_dropped
                    job = self._next_demanded()
                    if job is not None:
                        break
                    if not self._demanded and len(self._running) == 1:
                        return True
                    self._lock.wait()
            self._complete(job)

    def _run(self, job: Job) -> None:
        if not job.is_prefetch:
            n_bytes = self._read(*job.key, job.out, n_there=job.n_there)
            job.n_bytes = job.out.numel() - job.n_there if n_bytes is None else n_bytes
            return

        n_left = job.out.numel() - job.n_there

        def go_on(n_bytes: int) -> bool:
            nonlocal n_left
            n_left -= n_bytes
            with self._lock:
                self._prefetched_bytes += n_bytes
                if n_left <= 0:  # nothing is left to wait for
                    return not job.is_dropped
            return self._give_way(job)

        if job.arrivals is None:
            self._read(*job.key, job.out, n_there=job.n_there, go_on=go_on)
        else:  # claimed before it began: it is no longer cancelled
            self._read(*job.key, job.out, n_there=job.n_there)
            go_on(job.out.numel() - job.n_there)
