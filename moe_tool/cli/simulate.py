"""`moe-tool simulate`: replay a profile or a recorded run under budgets and policies."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.chosen_hardware import chosen_hardware
from moe_tool.cli.console import Output
from moe_tool.cli.newest_profile import newest_profile
from moe_tool.cli.options import MAX_CONTEXT, HardwareOption, ProfilesOption
from moe_tool.cli.verb import options_from, verb
from moe_tool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_tool.artifacts.hardware_profile import HardwareProfile
    from moe_tool.artifacts.simulation_report import SimulationReport
    from moe_tool.policies.eviction import EvictionChoice

Bits = Literal["native", "8", "4"]
_DEFAULT_BITS: Bits = "native"
"""Precision that `pack` keeps by default"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateArguments:
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="PROFILE",
            help="A profile, or a trace of `run --record-trace`.",
            show_default="newest in profiles/",
        ),
    ] = None
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE,...",
            help="Budgets: 10%..100% of the experts in steps of 10, single shares, or bytes of the "
            "whole process (4GiB, or min: the least that works).",
            show_default="10%..100%",
        ),
    ] = None
    eviction: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=N,...]",
            help="Eviction policy, {evictions}; may end in `:per-layer`; repeat it for several.",
            show_default="all with compiled replay",
        ),
    ] = None
    bits: Annotated[
        Bits | None, typer.Option(help="Bits of the experts.", show_default=_DEFAULT_BITS)
    ] = None
    skeleton_bits: Annotated[Bits, typer.Option(help="Bits of the other matrices.")] = "native"
    context: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_CONTEXT,
            help="Tokens of prompt and text, for budgets in bytes.",
        ),
    ] = 4096
    hardware: HardwareOption = None
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw hit rate and tokens/s against the budget: .png, .svg or .html.",
        ),
    ] = None
    details: Annotated[
        bool, typer.Option("--details", help="Print every figure of every row, not only two.")
    ] = False
    profiles: ProfilesOption = DEFAULT_FOLDER


@verb
def simulate(given: SimulateArguments, output: Output) -> None:
    """Replay a trace under every budget and eviction policy. Needs no model."""
    from moe_tool.formats.profile_hdf5 import ProfileReader
    from moe_tool.formats.run_trace_hdf5 import is_run_trace
    from moe_tool.planning.simulate_profile import SimulateOptions, simulate_profile
    from moe_tool.reports.simulation_plot import require_plot_path

    choices = _choices(given.eviction, output)
    if given.plot is not None:
        require_plot_path(given.plot)
    machine = chosen_hardware(given.hardware, given.profiles, output)
    source = given.source or newest_profile(given.profiles, output)
    if is_run_trace(source):
        if given.memory or given.plot is not None:
            raise UsageError(
                f"{source} is the trace of one run at one budget",
                hint="--memory and --plot go with a profile",
            )
        _compare_run(source, machine, choices, output)
        return
    memory, bits = given.memory or ["10%..100%"], given.bits or _DEFAULT_BITS
    options = options_from(given, SimulateOptions, choices=choices, memory=memory, bits=bits)
    with ProfileReader.open(source) as profile:
        report = simulate_profile(profile, machine, options, progress=output.progress)
    _show(report, output, details=given.details, is_default=given.bits is None)
    if given.plot is not None:
        _draw(given.plot, report, output)


def _choices(names: list[str] | None, output: Output) -> "list[EvictionChoice]":
    from moe_tool.policies.eviction import parse_eviction
    from moe_tool.simulator.simulate import default_choices, replayed_in_python

    if names:
        return [parse_eviction(name) for name in names]
    slow = ", ".join(replayed_in_python())
    if slow:
        output.say(f"without {slow}, which Python replays, slower: --eviction NAME")
    return default_choices()


def _words(bits: str) -> str:
    return "native precision" if bits == "native" else f"{bits} bits"


def _show(report: "SimulationReport", output: Output, *, details: bool, is_default: bool) -> None:
    from moe_tool.artifacts.simulation_report import rows_by_policy
    from moe_tool.reports.simulation_table import details_table, hit_rate_table, prompt_table

    others = ", as pack keeps them; --bits 8 or 4 for others" if is_default else ""
    output.show(
        f"decoding {report.tokens} {report.part} tokens, one at a time, experts at "
        f"{_words(report.bits)}{others}: hits and tokens/s",
        hit_rate_table(rows_by_policy(report.rows)),
    )
    if report.gaps:
        labels, names = (", ".join(dict.fromkeys(each)) for each in zip(*report.gaps, strict=True))
        output.say(f"-: at {labels} a layer's part of {names} cannot hold one token's experts")
    shown = report.rows if details else report.best()
    output.show("", "the best policy of each budget", details_table(shown))
    cliff = report.cliff
    output.say(
        f"one token calls {cliff.experts:.0f} of {report.experts} experts "
        f"({format_bytes(cliff.bytes)}, {cliff.experts / report.experts:.0%}): an lru cache "
        "smaller than that hits little or nothing"
    )
    for sentence in report.warnings:
        output.say(f"warning: {sentence}")
    output.show(
        "",
        "prompts in chunks of 256 tokens: hits and bytes read per token",
        prompt_table(report.prompt_rows),
    )
    unheard = ", ".join(report.unheard)
    # A chunk may use more experts than there are slots; a cache per layer can then beat Belady's.
    output.say(
        "without belady, which is no bound if a chunk uses more experts than fit"
        + (f"; without {unheard}, which need scores per token" if unheard else "")
    )
    _show_prefetch(report, output)
    rate = report.accesses_per_second / 1e6
    output.say(f"{rate:.1f} million accesses per second, {output.seconds:.1f} s")
    output.result(report)


def _show_prefetch(report: "SimulationReport", output: Output) -> None:
    from moe_tool.reports.simulation_table import prefetch_table

    if not report.prefetch_rows:
        return
    output.show("", "prefetch, under the best policy", prefetch_table(report.prefetch_rows))
    paying = [f"{row.memory} ({row.prefetch})" for row in report.prefetch_rows if row.pays]
    output.say(
        f"prefetch pays at {', '.join(dict.fromkeys(paying))}"
        if paying
        else "prefetch does not pay: it saves less than 2 % of the time, or costs more"
    )


def _draw(path: Path, report: "SimulationReport", output: Output) -> None:
    from moe_tool.formats.atomic_write import atomic_write_bytes
    from moe_tool.reports.simulation_plot import drawn_plot

    data = drawn_plot(path, report, bits=_words(report.bits))
    atomic_write_bytes(path, data)
    output.say(f"wrote {path}")


def _compare_run(
    path: Path,
    hardware: "HardwareProfile",
    choices: "Sequence[EvictionChoice]",
    output: Output,
) -> None:
    from moe_tool.formats.run_trace_hdf5 import read_run_trace
    from moe_tool.planning.compare_run import compare_run
    from moe_tool.reports.simulation_table import comparison_table, policies_table

    header, calls = read_run_trace(path)
    report = compare_run(header, calls, hardware, choices)
    output.show(
        f"{header.identity.name}: {header.n_slots} expert slots, {header.eviction}, prefetch "
        f"{header.prefetch}, {header.decode_tokens} tokens decoded",
        comparison_table(report),
    )
    output.show("", "the same calls under other policies", policies_table(report.policies))
    output.result(report)
