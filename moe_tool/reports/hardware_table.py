"""Tables of a hardware profile."""

from rich.table import Table

from moe_tool.artifacts.hardware_profile import BITS, REST_S, HardwareProfile, LookupSpeed
from moe_tool.budget.sizes import format_bytes
from moe_tool.reports.columns import columns


def origin_of(profile: HardwareProfile) -> str:
    """Return a line with the machine and whether it was measured."""
    how = (
        f"measured with {profile.kernels} kernels"
        if profile.source == "measured"
        else f"NOT measured: from data sheets, for {profile.kernels} kernels"
    )
    return f"{profile.name}, {format_bytes(profile.ram_bytes)} of memory, {how}"


def speeds_table(profile: HardwareProfile) -> Table:
    """Return one row per measurement of disk, memory, decoder layer and GPU."""
    table = columns("what", "how", "speed", words=(0, 1))
    for disk in profile.disk:
        how = f"{disk.pattern}, {format_bytes(disk.read_bytes)}, {_many(disk.readers, 'reader')}"
        table.add_row("disk", how, _rate(disk.bytes_per_s))
    table.add_section()
    for memory in profile.memory:
        how = _many(memory.threads, "thread")
        table.add_row("memory", how, _rate(memory.bytes_per_s))
    table.add_section()
    what = "layer beside its matrices"
    table.add_row(what, "caches warm", f"{1e3 * profile.layer_warm_s:.2f} ms")
    how = f"beside {format_bytes(profile.cold_bytes)} of experts"
    table.add_row(what, how, f"{1e3 * profile.layer_cold_s:.2f} ms")
    table.add_row(
        what, f"after a wait of {1e3 * REST_S:.0f} ms too", f"{1e3 * profile.layer_rested_s:.2f} ms"
    )
    if profile.gpu is not None:
        gpu = profile.gpu
        table.add_section()
        name = f"{gpu.name}, {format_bytes(gpu.memory_bytes)}"
        table.add_row(name, "its memory", _rate(gpu.memory_bytes_per_s))
        table.add_row(name, "from the host", _rate(gpu.link_bytes_per_s))
    return table


def experts_table(profile: HardwareProfile) -> Table:
    """Return a row per width and number of threads, a column per number of tokens: rate and fixed
    time of one call."""
    tokens = sorted({row.tokens for row in profile.experts})
    table = columns("bits", "threads", *(f"{_many(n, 'token')} at once" for n in tokens))
    found = {
        (
            row.bits,
            row.threads,
            row.tokens,
        ): f"{_rate(row.bytes_per_s)} + {1e6 * row.fixed_s:.0f} us"
        for row in profile.experts
    }
    for bits in BITS:
        for threads in sorted({row.threads for row in profile.experts if row.bits == bits}):
            cells = (found.get((bits, threads, n_tokens), "-") for n_tokens in tokens)
            table.add_row(bits, str(threads), *cells)
    return table


def lookup_table(profile: HardwareProfile) -> Table:
    """Return a row per width, a column per number of tokens: the method in use and the times of
    both; empty if not measured."""
    tokens = sorted({row.tokens for row in profile.lookup})
    table = columns("bits", *(_many(n, "token") for n in tokens))
    found = {(row.bits, row.tokens): _both_ways(row) for row in profile.lookup}
    for bits in sorted({row.bits for row in profile.lookup}):
        table.add_row(bits, *(found.get((bits, n_tokens), "-") for n_tokens in tokens))
    return table


def _both_ways(row: LookupSpeed) -> str:
    used = "looked up" if row.is_used else "multiplied"
    return f"{used}: {1e6 * row.lookup_s:.0f} us, {1e6 * row.multiply_s:.0f} us"


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
