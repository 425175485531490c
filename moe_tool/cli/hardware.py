"""`moe-tool hardware`: measure this machine, or take a typical machine's data sheet."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.verb import verb
from moe_tool.errors import MoeToolError, UsageError

if TYPE_CHECKING:
    from moe_tool.artifacts.hardware_profile import HardwareProfile

_OUT = DEFAULT_FOLDER / "hardware.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareArguments:
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The profile.", show_default=str(_OUT))
    ] = None
    disk: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder on the disk for bundles: a test file of 1 GiB is written there, read "
            "and removed.",
            show_default=".",
        ),
    ] = None
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Take a quarter of the time: a test file of 256 MiB, fewer repetitions."
        ),
    ] = False
    shipped: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Measure nothing; write the profile of a typical machine, from data sheets. A "
            "measured profile is replaced only if --out names it.",
        ),
    ] = None
    show_list: Annotated[
        bool, typer.Option("--list", help="List the shipped profiles and exit.")
    ] = False


@verb
def hardware(given: HardwareArguments, output: Output) -> None:
    """Measure how fast this machine reads and computes. Takes a minute or two."""
    if given.shipped is not None and (given.disk is not None or given.quick):
        raise UsageError(
            "--shipped cannot be combined with --disk or --quick: it measures nothing",
            hint="leave out --shipped to measure this machine",
        )
    if given.show_list:
        _list_shipped(output)
        return
    if given.shipped is not None:
        from moe_tool.hardware.shipped import shipped_profile

        profile = shipped_profile(given.shipped)
        if given.out is None:
            _refuse_to_lose_measured(_OUT, given.shipped)
    else:
        from moe_tool.hardware.measure import measure_hardware

        profile = measure_hardware(
            given.disk or Path(), quick=given.quick, progress=output.progress
        )

    from moe_tool.formats.json_artifact import write_json_artifact

    out = given.out or _OUT
    write_json_artifact(out, profile)
    _show(profile, output)
    how = (
        f"measured in {output.seconds:.0f} s; other running programs affect the figures"
        if profile.source == "measured"
        else "data-sheet figures, nothing was measured"
    )
    output.say(f"wrote {out}: {format_bytes(out.stat().st_size)}; {how}")
    output.say(f"next: moe-tool inspect {out}")
    output.result({"hardware": out, **profile.model_dump()})


def _refuse_to_lose_measured(path: Path, shipped: str) -> None:
    """Refuse to replace a measured profile by a data sheet unless --out asks for it."""
    from moe_tool.artifacts.hardware_profile import HardwareProfile
    from moe_tool.formats.json_artifact import read_json_artifact

    try:
        is_measured = read_json_artifact(path, HardwareProfile).source == "measured"
    except MoeToolError:
        return  # no usable profile to lose
    if is_measured:
        raise UsageError(
            f"{path} was measured: --shipped replaces it only with --out",
            hint=f"--hardware {shipped} takes the data sheet without a file; --out {path} "
            "replaces the measured profile",
        )


def _show(profile: "HardwareProfile", output: Output) -> None:
    from moe_tool.reports.hardware_table import (
        experts_table,
        lookup_table,
        origin_of,
        speeds_table,
    )

    threads = " and ".join(str(n) for n in sorted({row.threads for row in profile.experts}))
    output.show(
        origin_of(profile),
        speeds_table(profile),
        f"time of one expert call by {profile.kernels} kernels with --threads {threads}: "
        "record size / rate + fixed time",
        experts_table(profile),
    )
    if profile.lookup:
        output.show(
            "low-bit products by lookup or multiplication, with equal results: times, and the "
            "method used",
            lookup_table(profile),
        )


def _list_shipped(output: Output) -> None:
    from moe_tool.hardware.shipped import SHEETS
    from moe_tool.reports.terminal import facts_table

    shipped = {name: sheet.about for name, sheet in SHEETS.items()}
    output.show(
        "from data sheets, not measured; take one with --shipped NAME", facts_table(shipped)
    )
    output.result({"shipped": shipped})
