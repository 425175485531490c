"""Memory that is left for this process, and memory that it has used."""

import os
from pathlib import Path
from typing import NamedTuple

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 2**60
"""Limits from here on mean none: cgroup v1 writes "no limit" as a number near 2**63"""


def available_memory_bytes(
    *,
    meminfo: Path = _MEMINFO,
    membership: Path = _MEMBERSHIP,
    cgroup_root: Path = _CGROUP_ROOT,
) -> int:
    """Return the bytes that this process may still allocate without swapping or being killed.

    The minimum over the machine's available memory and the room under the limit of each enclosing
    memory cgroup (v1 and v2). Page cache that the kernel can drop counts as free. Memory that the
    process already holds is not included.
    """
    cgroups = _memory_cgroups(membership, cgroup_root)
    rooms = [_cgroup_available(folder, files) for folder, files in cgroups]
    return max(0, min([_machine_available(meminfo), *rooms]))


def peak_rss_bytes(status: Path = _STATUS) -> int:
    """Return the peak resident size of this process (VmHWM); 0 if unknown."""
    return _kib_field(status, "VmHWM") or 0


def reset_peak_rss(clear_refs: Path = _CLEAR_REFS) -> bool:
    """Set the process's peak resident size to its present size; return whether that worked.

    If not, a later peak is that of the whole process so far.
    """
    try:
        clear_refs.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def current_rss_bytes(status: Path = _STATUS) -> int:
    """Return the resident size of this process (VmRSS); 0 if unknown."""
    return _kib_field(status, "VmRSS") or 0


def anonymous_rss_bytes(status: Path = _STATUS) -> int:
    """Return the part of the resident size that no file backs (RssAnon + RssShmem).

    Added to `available_memory_bytes` it is the size that the process can reach. The whole resident
    size would count mapped library pages twice: the kernel can drop them, so they are available.
    """
    return (_kib_field(status, "RssAnon") or 0) + (_kib_field(status, "RssShmem") or 0)


class _CgroupFiles(NamedTuple):
    """Names of the files of one cgroup version."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_V1 = _CgroupFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_V2 = _CgroupFiles("memory.max", "memory.current", ("inactive_file", "active_file"))


def _machine_available(meminfo: Path) -> int:
    available = _kib_field(meminfo, "MemAvailable")
    if available is not None:
        return available
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_cgroups(membership: Path, root: Path) -> list[tuple[Path, _CgroupFiles]]:
    """Return the process's memory cgroups and all their ancestors, any of which can bind."""
    found = []
    for line in _lines(membership):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mounts: tuple[Path, ...] = (root, root / "unified")
            files = _V2
        elif "memory" in controllers.split(","):
            mounts, files = (root / "memory",), _V1
        else:
            continue
        for mount in mounts:
            folder = mount / path.lstrip("/")
            found += [(level, files) for level in _upwards(folder, mount)]
    return found


def _upwards(folder: Path, mount: Path) -> list[Path]:
    """Return `folder` and its parents up to `mount`.

    Inside a container the path is often the host's and does not exist; the container's own limit is
    then at the mount.
    """
    levels = [folder, *folder.parents]
    return [level for level in levels if level == mount or mount in level.parents]


def _cgroup_available(folder: Path, files: _CgroupFiles) -> int:
    limit = _number(folder / files.limit)
    usage = _number(folder / files.usage)
    if limit is None or usage is None or limit >= _UNLIMITED_BYTES:
        return _UNLIMITED_BYTES
    reclaimable = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in files.reclaimable and value.strip().isdigit():
            reclaimable += int(value)
    return limit - max(0, usage - reclaimable)


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _kib_field(path: Path, name: str) -> int | None:
    for line in _lines(path):
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
