"""What a profile answers, by hand; what it refuses to hold; that it comes back from its file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_tool.artifacts.hardware_profile import (
    BITS,
    DiskSpeed,
    ExpertSpeed,
    HardwareProfile,
    MemorySpeed,
)
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from tests.hardware.made_profile import made_profile


@pytest.mark.parametrize(
    ("read_bytes", "readers", "wanted"),
    [
        (4096, 1, 1e9),
        (1, 1, 1e9),
        (4096, 2, 1e9),  # as near to 1 as to 3: 4 is farther
        (4096, 3, 2e9),
        (16384, 1, 1e9),  # the middle by ratio: the smaller
        (16385, 1, 3e9),  # the middle by difference would be 34816
        (2**30, 1, 3e9),
        (65536, 4, 3e9),  # size counts before readers
    ],
)
def test_the_nearest_random_read_answers(read_bytes: int, readers: int, wanted: float) -> None:
    assert made_profile().disk_bytes_per_s(read_bytes, readers) == wanted


@pytest.mark.parametrize(("threads", "wanted"), [(1, 1e10), (4, 1e10), (5, 4e10), (64, 4e10)])
def test_the_nearest_number_of_threads_answers(threads: int, wanted: float) -> None:
    assert made_profile().memory_bytes_per_s(threads) == wanted


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (1, 2.0),  # 1 + 1000 / 1000
        (2, 2.0 + 2.0 / 3),
        (4, 4.0),  # 2 + 1000 / 500
        (10, 6.0),  # halfway to 8
        (16, 8.0),  # 4 + 1000 / 250
        (28, 12.0),  # as many tokens farther as from 4 to 16
    ],
)
def test_an_expert_call_lies_on_a_line_between_tokens(tokens: int, wanted: float) -> None:
    assert made_profile().expert_seconds("4", 1000, tokens, 1) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("bits", "threads", "wanted"),
    [
        ("4", 8, 0.75),  # 0.5 + 1000 / 4000
        ("4", 4, 2.0),  # nearer to 1 thread than to 8
        ("4", 5, 0.75),
        ("3", 1, 2.0),  # nearer to 4 bits than to 16
        ("8", 1, 2.0),  # twice 4, half of 16: the lower
        ("native", 8, 8.0),  # 1000 / 125: no other number of threads
    ],
)
def test_the_nearest_width_then_the_nearest_threads_answer(
    bits: Any, threads: int, wanted: float
) -> None:
    assert made_profile().expert_seconds(bits, 1000, 1, threads) == pytest.approx(wanted)


def test_time_does_not_fall_beyond_the_most_tokens_measured() -> None:
    rows = (
        ExpertSpeed(bits="4", tokens=1, threads=1, fixed_s=2.0, bytes_per_s=1000.0),
        ExpertSpeed(bits="4", tokens=4, threads=1, fixed_s=1.0, bytes_per_s=1000.0),
    )
    assert made_profile(experts=rows).expert_seconds("4", 1000, 1000, 1) == 2.0


@pytest.mark.parametrize(
    ("record_bytes", "wanted"),
    [(0, 0.5), (500, 2.0), (1000, 3.5), (2000, 4.5)],  # 0.5 to 3.5 s, then the fitted line
)
def test_below_the_fitted_sizes_a_call_costs_what_a_tiny_one_does(
    record_bytes: int, wanted: float
) -> None:
    row = ExpertSpeed(
        bits="4", tokens=1, threads=1, fixed_s=2.5, bytes_per_s=1000.0,
        fitted_from_bytes=1000, tiny_s=0.5,
    )  # fmt: skip
    assert row.seconds(record_bytes) == wanted
    assert row.model_copy(update={"tiny_s": None}).seconds(0) == 2.5
    assert row.model_copy(update={"tiny_s": 9.0}).seconds(0) == 3.5  # noise: never above the line


@pytest.mark.parametrize(
    ("touched", "wanted"), [(0, 0.25), (500, 0.5), (1000, 0.75), (10**9, 0.75)]
)
def test_a_layer_gets_colder_until_the_caches_are(touched: int, wanted: float) -> None:
    assert made_profile().layer_seconds(touched) == wanted


@given(
    sizes=st.lists(st.integers(1, 2**40), min_size=1, max_size=4),
    read_bytes=st.integers(1, 2**40),
    threads=st.integers(1, 99),
)
def test_every_question_has_one_of_the_measured_answers(
    sizes: list[int], read_bytes: int, threads: int
) -> None:
    disk = tuple(
        DiskSpeed(pattern="random", read_bytes=size, readers=2, bytes_per_s=float(size))
        for size in sizes
    )
    memory = tuple(MemorySpeed(threads=1 + size % 99, bytes_per_s=float(size)) for size in sizes)
    profile = made_profile(disk=disk, memory=memory)
    found = profile.disk_bytes_per_s(read_bytes, 4)
    assert found in sizes

    def ratio(size: float) -> float:
        return max(size / read_bytes, read_bytes / size)

    assert ratio(found) <= min(ratio(size) for size in sizes) * (1 + 1e-9)
    assert profile.memory_bytes_per_s(threads) in sizes
    for bits in BITS:
        assert profile.expert_seconds(bits, 1, 1, 1) > 0


@pytest.mark.parametrize("gpu", [True, False])
def test_a_profile_comes_back(tmp_path: Path, gpu: bool) -> None:
    wanted = made_profile() if gpu else made_profile(gpu=None)
    path = tmp_path / "profiles" / "hardware.json"
    write_json_artifact(path, wanted)
    first = path.read_bytes()
    found = read_json_artifact(path, HardwareProfile)
    assert found == wanted
    write_json_artifact(path, found)
    assert path.read_bytes() == first


@pytest.mark.parametrize("field", ["disk", "memory", "experts"])
def test_a_profile_without_rows_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        made_profile(**{field: ()})


def test_a_profile_without_a_random_read_is_refused() -> None:
    rows = (DiskSpeed(pattern="sequential", read_bytes=4096, readers=1, bytes_per_s=9e9),)
    with pytest.raises(ValidationError, match="no random read"):
        made_profile(disk=rows)


def test_a_profile_from_before_there_were_lookups_is_read() -> None:
    fields = made_profile().model_dump(mode="json")
    assert fields.pop("lookup") == []
    assert HardwareProfile.model_validate_json(json.dumps(fields)) == made_profile()
