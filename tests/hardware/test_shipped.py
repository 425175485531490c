"""Shipped profiles hold what their data sheets say, and say that nobody measured them."""

import pytest

from moe_tool.artifacts.hardware_profile import BITS, HardwareProfile
from moe_tool.errors import UsageError
from moe_tool.hardware.shipped import SHEETS, shipped_profile
from moe_tool.reports.hardware_table import origin_of


@pytest.mark.parametrize("name", SHEETS)
def test_a_shipped_profile_is_valid_and_not_measured(name: str) -> None:
    profile = shipped_profile(name)
    assert HardwareProfile.model_validate_json(profile.model_dump_json()) == profile
    assert profile.source == "data-sheet" and profile.name == name
    assert "NOT measured" in origin_of(profile)


@pytest.mark.parametrize("name", SHEETS)
def test_nothing_is_faster_than_its_data_sheet(name: str) -> None:
    sheet, profile = SHEETS[name], shipped_profile(name)
    assert max(row.bytes_per_s for row in profile.disk) < sheet.disk_bytes_per_s
    assert max(row.bytes_per_s for row in profile.memory) < sheet.memory_bytes_per_s
    for row in profile.experts:
        assert row.bytes_per_s < profile.memory_bytes_per_s(row.threads)
    assert profile.layer_warm_s < profile.layer_cold_s


@pytest.mark.parametrize("name", SHEETS)
def test_more_of_anything_is_never_slower(name: str) -> None:
    profile = shipped_profile(name)
    for size in (256 * 2**10, 4 * 2**20, 24 * 2**20):
        rates = [profile.disk_bytes_per_s(size, readers) for readers in (1, 2, 4)]
        assert rates == sorted(rates)
    for bits in BITS:
        times = [profile.expert_seconds(bits, 10**7, tokens, 1) for tokens in (1, 4, 16, 64, 128)]
        assert times == sorted(times)
        one, all_cores = (
            profile.expert_seconds(bits, 10**7, 1, threads) for threads in (1, profile.cores)
        )
        assert all_cores < one


def test_a_disk_by_hand() -> None:
    profile = shipped_profile("desktop-sata-32gb")
    # 0.9 x 560 MB/s; 256 KiB take 77 us + 262144 / 504e6 s = 597.1 us: 439 MB/s.
    assert profile.disk_bytes_per_s(256 * 2**10, 1) == pytest.approx(439.0e6, rel=1e-3)
    assert profile.disk_bytes_per_s(256 * 2**10, 2) == pytest.approx(504e6)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'abacus'") as caught:
        shipped_profile("abacus")
    assert caught.value.hint is not None and all(name in caught.value.hint for name in SHEETS)
