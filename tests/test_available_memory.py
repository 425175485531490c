"""Free memory is the smallest of what the machine and every enclosing cgroup leave."""

from pathlib import Path

import pytest

from moe_tool.available_memory import (
    anonymous_rss_bytes,
    available_memory_bytes,
    current_rss_bytes,
    peak_rss_bytes,
)

MIB = 2**20


def _machine(folder: Path, available_mib: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal: 1 kB\nMemAvailable: {available_mib * 1024} kB\n")
    return path


def _membership(folder: Path, text: str) -> Path:
    path = folder / "membership"
    path.write_text(text)
    return path


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_without_a_cgroup_the_machine_decides(tmp_path: Path) -> None:
    free = available_memory_bytes(
        meminfo=_machine(tmp_path, 700),
        membership=tmp_path / "missing",
        cgroup_root=tmp_path,
    )
    assert free == 700 * MIB


def test_cgroup_v1_counts_page_cache_as_free(tmp_path: Path) -> None:
    _group(
        tmp_path / "memory" / "job",
        memory__limit_in_bytes=f"{500 * MIB}\n",
        memory__usage_in_bytes=f"{300 * MIB}\n",
        memory__stat=f"total_inactive_file {90 * MIB}\ntotal_active_file {10 * MIB}\ncache 5\n",
    )
    free = available_memory_bytes(
        meminfo=_machine(tmp_path, 700),
        membership=_membership(tmp_path, "5:cpu:/x\n4:memory:/job\n0::/\n"),
        cgroup_root=tmp_path,
    )
    assert free == (500 - 300 + 100) * MIB


def test_an_enclosing_cgroup_v2_limit_binds(tmp_path: Path) -> None:
    _group(
        tmp_path / "outer",
        memory__max=f"{200 * MIB}\n",
        memory__current=f"{150 * MIB}\n",
        memory__stat="inactive_file 0\nactive_file 0\n",
    )
    _group(tmp_path / "outer" / "inner", memory__max="max\n", memory__current="1\n")
    free = available_memory_bytes(
        meminfo=_machine(tmp_path, 700),
        membership=_membership(tmp_path, "0::/outer/inner\n"),
        cgroup_root=tmp_path,
    )
    assert free == 50 * MIB


def test_a_container_whose_path_is_the_hosts_uses_the_mount(tmp_path: Path) -> None:
    _group(
        tmp_path / "memory",
        memory__limit_in_bytes=f"{64 * MIB}\n",
        memory__usage_in_bytes=f"{80 * MIB}\n",
        memory__stat="",
    )
    free = available_memory_bytes(
        meminfo=_machine(tmp_path, 700),
        membership=_membership(tmp_path, "4:memory:/docker/0123\n"),
        cgroup_root=tmp_path,
    )
    assert free == 0


def test_unlimited_v1_is_no_limit(tmp_path: Path) -> None:
    _group(
        tmp_path / "memory",
        memory__limit_in_bytes="9223372036854771712\n",
        memory__usage_in_bytes=f"{80 * MIB}\n",
        memory__stat="",
    )
    free = available_memory_bytes(
        meminfo=_machine(tmp_path, 700),
        membership=_membership(tmp_path, "4:memory:/\n"),
        cgroup_root=tmp_path,
    )
    assert free == 700 * MIB


def test_peak_is_at_least_the_current_size() -> None:
    if current_rss_bytes() == 0:
        pytest.skip("no /proc here")
    assert peak_rss_bytes() >= current_rss_bytes() > MIB


def test_pages_of_libraries_are_not_anonymous(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmRSS: 366 kB\nRssAnon: 260 kB\nRssFile: 98 kB\nRssShmem: 8 kB\n")
    assert anonymous_rss_bytes(status) == 268 * 1024
    assert 0 < anonymous_rss_bytes() < current_rss_bytes()
