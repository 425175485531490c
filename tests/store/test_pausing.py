"""A prefetch of several pieces lets demanded reads pass: judged by the order of reads."""

import threading

import pytest
import torch

from moe_tool.store.reader import RecordReader
from moe_tool.store.throttle import Throttle, ThrottledDisk

N_PIECES, PIECE = 4, 10
FAR, NEAR, OTHER = (5, 0), (1, 0), (1, 1)


class _Disk:
    """Reads in pieces and notes their order; a read can be stopped before a piece."""

    def __init__(self):
        self.log = []
        self.reached = {}
        self.gates = {}

    def stop_before(self, key, piece):
        """Return (reached, gate): the read has come to a piece; set the gate to let it pass."""
        reached, gate = threading.Event(), threading.Event()
        self.reached[key, piece], self.gates[key, piece] = reached, gate
        return reached, gate

    def read(self, layer, expert, out, *, n_there=0, go_on=None):
        key = (layer, expert)
        for piece in range(N_PIECES):
            if (key, piece) in self.gates:
                self.reached[key, piece].set()
                assert self.gates[key, piece].wait(60)
            out[piece * PIECE : (piece + 1) * PIECE] = 1
            self.log.append((key, piece))
            if go_on is not None and not go_on(PIECE):
                return None
        return None

    def order(self):
        """Return the keys in the order of their pieces, neighbours of one key as one."""
        keys = [key for key, _ in self.log]
        return [key for at, key in enumerate(keys) if at == 0 or keys[at - 1] != key]


def _memory():
    return torch.zeros(N_PIECES * PIECE, dtype=torch.uint8)


@pytest.fixture
def disk():
    return _Disk()


def _reader(read, n_readers):
    return RecordReader(read, n_readers=n_readers)


@pytest.mark.parametrize("n_readers", [1, 2, 3])
def test_a_prefetch_goes_on_only_when_no_demanded_read_is_left(disk, n_readers):
    reader, far = _reader(disk.read, n_readers), _memory()
    reached, gate = disk.stop_before(FAR, 1)
    begun, end = disk.stop_before(NEAR, N_PIECES - 1)
    reader.prefetch(FAR, far)
    # The second piece is under way when the demanded reads arrive.
    assert reached.wait(60)
    reader.start(NEAR, _memory())
    reader.start(OTHER, _memory())
    gate.set()
    assert begun.wait(60)
    if n_readers > 1:  # the other demanded read ends; one is still under way
        assert reader.next_arrival().key == OTHER
    assert sum(key == FAR for key, _ in disk.log) <= 2
    end.set()
    while reader.n_under_way:
        reader.next_arrival()
    assert not reader.claim(FAR) or bool(far.all())
    while reader.n_under_way:
        reader.next_arrival()
    assert bool(far.all())
    last_demanded = max(at for at, (key, _) in enumerate(disk.log) if key != FAR)
    assert min(disk.log.index((FAR, piece)) for piece in (2, 3)) > last_demanded
    assert reader.take_prefetched_bytes() == N_PIECES * PIECE
    reader.close()


def test_a_prefetch_that_is_wanted_by_now_waits_for_nobody(disk):
    """With one reader the demanded read is in the queue, and the claimed record is finished
    first."""
    reader, far = _reader(disk.read, 1), _memory()
    reached, gate = disk.stop_before(FAR, 1)
    reader.prefetch(FAR, far)
    assert reached.wait(60)
    assert not reader.claim(FAR)
    reader.start(NEAR, _memory())
    gate.set()
    assert [reader.next_arrival().key for _ in range(2)] == [FAR, NEAR]
    assert disk.order() == [FAR, NEAR]
    reader.close()


@pytest.mark.parametrize("n_readers", [1, 2])
def test_a_prefetch_that_is_dropped_while_it_waits_reads_no_more(disk, n_readers):
    reader, far = _reader(disk.read, n_readers), _memory()
    reached, gate = disk.stop_before(FAR, 1)
    begun, end = disk.stop_before(NEAR, 1)
    reader.prefetch(FAR, far)
    assert reached.wait(60)
    reader.start(NEAR, _memory())
    gate.set()
    assert begun.wait(60)
    reader.drop(FAR)
    # Its memory can be read into at once, and is not while the dropped read may write to it.
    reader.start(OTHER, far)
    end.set()
    assert {reader.next_arrival().key for _ in range(2)} == {NEAR, OTHER}
    assert bool(far.all()) and reader.is_free(far)
    assert sum(key == FAR for key, _ in disk.log) == 2
    reader.close()


def test_a_demanded_read_on_a_slow_disk_waits_for_one_piece(disk):
    """One reader, ten bytes a second, a clock that only sleeping moves: the demanded record of four
    pieces comes after the piece under way and its own, and the far one after that."""
    now = [0.0]
    slow = ThrottledDisk(
        speed=Throttle(bytes_per_s=PIECE),
        clock=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    ).slow_down(disk.read)
    came = {}

    def read(layer, expert, out, *, n_there=0, go_on=None):
        slow(layer, expert, out, n_there=n_there, go_on=go_on)
        came[layer, expert] = now[0]

    reader = _reader(read, 1)
    reached, gate = disk.stop_before(FAR, 0)
    reader.prefetch(FAR, _memory())
    assert reached.wait(60)
    reader.start(NEAR, _memory())
    gate.set()
    assert reader.next_arrival().key == NEAR
    if not reader.claim(FAR):
        reader.next_arrival()
    assert came == {NEAR: 1 + N_PIECES, FAR: 2 * N_PIECES}
    reader.close()
