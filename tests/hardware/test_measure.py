"""The whole measurement on tiny sizes, memory, GPU, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.errors import BudgetError
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.hardware import gpu, measure
from moe_tool.hardware.gpu import measure_gpu
from moe_tool.hardware.layers import LayerShape
from moe_tool.hardware.measure import Effort, measure_hardware
from moe_tool.hardware.memory import measure_memory
from moe_tool.hardware.timing import median_seconds
from moe_tool.native.kernels import kernels_in_use

TINY = Effort(
    disk_bytes=24 * 2**20,
    disk_pass_s=0.001,
    memory_bytes=2**20,
    block_bytes=2**22,
    repetitions=2,
    tokens=(1, 2),
    expert_s=0.001,
    decoded_tokens=3,
    decode_s=0.1,
    expert_shapes=((128, 128), (256, 256)),
    layer_shape=LayerShape(n_layers=2, hidden=64, heads=4, kv_heads=2, record_bytes=40_000),
)


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as little as there can be."""
    monkeypatch.setattr(measure, "FULL", TINY)
    monkeypatch.setattr(measure, "_CACHES", Path("/nowhere"))
    monkeypatch.setattr(measure, "_ROOM_BYTES", 0)
    monkeypatch.setattr("moe_tool.hardware.disk._ROOM_BYTES", 0)


def test_a_machine_is_measured_whole(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    torch.set_num_threads(2)
    folder = tmp_path / "disk"
    folder.mkdir()
    profile = measure_hardware(folder)
    assert torch.get_num_threads() == 2
    assert list(folder.iterdir()) == []
    assert profile.source == "measured" and profile.kernels == kernels_in_use()
    assert profile.cores == 3 and profile.name.startswith("3 x ")
    assert [row.threads for row in profile.memory] == [1, 2, 3]
    assert {row.threads for row in profile.experts} == {1, 3}
    assert {row.tokens for row in profile.experts} == {1, 2}
    assert len(profile.disk) == 12
    # Every width is either multiplied at all numbers of tokens, or looked up below one of them.
    assert {row.bits for row in profile.lookup} in (set(), {"1", "2"})
    for bits in ("1", "2"):
        used = [row.is_used for row in profile.lookup if row.bits == bits]
        assert used == sorted(used, reverse=True)
    path = tmp_path / "hardware.json"
    write_json_artifact(path, profile)
    assert read_json_artifact(path, HardwareProfile) == profile


def test_too_little_memory_is_refused_before_the_disk_is_touched(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "available_memory_bytes", lambda: 2**20)
    monkeypatch.setattr(measure, "measure_disk", None)
    with pytest.raises(BudgetError, match=r"takes 4.00 MiB .*available are 1.00 MiB"):
        measure_hardware(tmp_path)


@pytest.mark.parametrize(("load", "is_told"), [(0.4, False), (3.25, True)])
def test_a_busy_machine_is_told_of(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, is_told: bool
) -> None:
    notes: list[str] = []
    told = SimpleNamespace(note=notes.append)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(measure, "measure_disk", stop)
    with pytest.raises(KeyboardInterrupt):
        measure_hardware(tmp_path, progress=told)
    assert [("3.25" in note) for note in notes] == ([True] if is_told else [])


@pytest.mark.parametrize(
    ("cores", "wanted"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])],
)
def test_threads_are_doubled_up_to_all_cores(cores: int, wanted: list[int]) -> None:
    assert measure._thread_counts(cores) == wanted


def test_the_largest_cache_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, text in enumerate(["64K", "1024K\n", "32M", "", "many"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    monkeypatch.setattr(measure, "_CACHES", tmp_path)
    assert measure._last_level_cache_bytes() == 32 * 2**20
    monkeypatch.setattr(measure, "_CACHES", tmp_path / "nowhere")
    assert measure._last_level_cache_bytes() == 0


def test_memory_is_what_the_fastest_way_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_tool.hardware import memory

    seconds = iter([[4.0, 2.0, 8.0], [1.0, 5.0, 5.0]])

    def timed(calls, **_: object) -> list[float]:
        assert len(calls) == 3
        for call in calls:
            call()
        return next(seconds)

    monkeypatch.setattr(memory, "median_seconds", timed)
    rows = measure_memory((1, 2), size_bytes=2**16, repetitions=1)
    assert [(row.threads, row.bytes_per_s) for row in rows] == [(1, 2**15), (2, 2**16)]


def timed_calls(monkeypatch: pytest.MonkeyPatch, *lasts: list[float], **more) -> list[float]:
    """What `median_seconds` says of calls that last so long, one after the other."""
    from moe_tool.hardware import timing

    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call_of(left: list[float]):
        def call() -> None:
            now[0] += left.pop(0)

        return call

    return median_seconds([call_of(left) for left in lasts], **more)


def test_medians_leave_the_first_call_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = [100.0, 3.0, 1.0, 7.0, 2.0], [0.0, 8.0, 9.0, 5.0]
    found = timed_calls(monkeypatch, one, other, repetitions=3, budget_s=60.0)
    assert found == [3.0, 8.0]
    assert (one, other) == ([2.0], [])


def test_two_turns_are_made_whatever_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1.0, 2.0, 4.0, 99.0]
    assert timed_calls(monkeypatch, left, repetitions=9, budget_s=0.0) == [3.0]
    assert left == [99.0]
    left = [1.0, 2.0, 2.0, 4.0, 99.0]  # 4 s are below the budget, 8 s are not
    assert timed_calls(monkeypatch, left, repetitions=9, budget_s=5.0) == [2.0]
    assert left == [99.0]


def test_without_a_gpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure_gpu() is None


def test_a_gpu_is_described_by_two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 MiB in a quarter second over the link, of 512 MiB in half a second in its memory."""
    seconds = iter([0.25, 0.5])
    on_cpu = SimpleNamespace(
        zeros=lambda n, **_: torch.zeros(n // 2**16, dtype=torch.uint8),
        empty_like=lambda tensor, **_: torch.empty_like(tensor),
        uint8=torch.uint8,
        cuda=SimpleNamespace(
            is_available=lambda: True,
            get_device_properties=lambda _: SimpleNamespace(name="Fake", total_memory=2**30),
        ),
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(gpu, "torch", on_cpu)
    monkeypatch.setattr(gpu, "_median_seconds", lambda call: (call(), next(seconds))[1])
    found = measure_gpu()
    assert found is not None
    assert (found.name, found.memory_bytes) == ("Fake", 2**30)
    assert found.link_bytes_per_s == 24 * 2**20 / 0.25
    assert found.memory_bytes_per_s == 2 * 2**29 / 0.5
