"""A slowed disk keeps to its bandwidth and latency, for all its readers together."""

import pytest
import torch

from moe_tool.errors import UsageError
from moe_tool.store.throttle import Throttle, ThrottledDisk, parse_throttle


class Clock:
    """Time that passes only when somebody sleeps, or when the real disk is slow."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def slowed(*, pieces=(1000,), real_s=0.0, latency_s=0.0, bytes_per_s=1000.0):
    clock = Clock()

    def read(layer, expert, out, *, n_there=0, go_on=None):
        clock.now += real_s
        for piece in pieces:
            if go_on is not None and not go_on(piece):
                return None
        return None

    speed = Throttle(bytes_per_s=bytes_per_s, latency_s=latency_s)
    disk = ThrottledDisk(speed=speed, clock=clock, sleep=clock.sleep)
    return clock, disk, disk.slow_down(read)


OUT = torch.zeros(1000, dtype=torch.uint8)


def test_a_read_takes_what_the_slow_disk_needs() -> None:
    clock, _, read = slowed(latency_s=0.25)
    read(0, 0, OUT)
    assert clock.now == pytest.approx(101.25)
    read(0, 1, OUT, n_there=400)
    assert clock.now == pytest.approx(101.25 + 0.6 + 0.25)


def test_a_slower_real_disk_is_not_slowed_further() -> None:
    clock, _, read = slowed(real_s=3.0)
    read(0, 0, OUT)
    assert clock.now == pytest.approx(103.0)


def test_bytes_of_several_readers_pass_one_after_the_other() -> None:
    clock, disk, _ = slowed(latency_s=0.5)
    ends = []
    disk.sleep = lambda seconds: ends.append(clock.now + seconds)  # two at the same time
    for _reader in range(2):
        disk.wait(1000, since=clock.now)
    assert ends == pytest.approx([101.5, 102.5])


def test_a_cancelled_read_pays_for_the_pieces_it_read() -> None:
    clock, _, read = slowed(pieces=(250, 250, 500), latency_s=0.1)
    seen = []

    def go_on(n_bytes):
        seen.append(n_bytes)
        return len(seen) < 2

    read(0, 0, OUT, go_on=go_on)
    assert seen == [250, 250]
    assert clock.now == pytest.approx(100 + 0.5 + 0.1)


@pytest.mark.parametrize(
    ("text", "bytes_per_s", "latency_s"),
    [
        ("200MB/s", 200e6, 0),
        ("10MB/s,", 10e6, 0),
        ("1GiB/s, 100us", 2**30, 1e-4),
        ("500k,2ms", 512000, 2e-3),
    ],
)
def test_words(text: str, bytes_per_s: float, latency_s: float) -> None:
    found = parse_throttle(text)
    assert found == Throttle(bytes_per_s=bytes_per_s, latency_s=pytest.approx(latency_s))


@pytest.mark.parametrize("text", ["", "fast", "0", "0/s", "10MB/s,x", "10MB/s,3", "-1"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--throttle"):
        parse_throttle(text)
