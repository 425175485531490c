"""`moe-tool simulate`: a profile or a recorded run in, what every budget and policy would cost
out."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER
from moe_tool.budget.sizes import format_bytes
from moe_tool.budget.slots import min_slots, split_slots
from moe_tool.cli.chosen_hardware import chosen_hardware
from moe_tool.cli.console import Output, open_output
from moe_tool.cli.newest_profile import newest_profile
from moe_tool.cli.options import MAX_CONTEXT, HardwareOption, JsonOption, ProfilesOption
from moe_tool.errors import UsageError

if TYPE_CHECKING:
    from moe_tool.artifacts.hardware_profile import HardwareProfile
    from moe_tool.formats.profile_hdf5 import ProfileReader
    from moe_tool.policies.eviction import EvictionChoice
    from moe_tool.simulator.simulate import Budget, Machine, SimulatedRow

Bits = Literal["native", "8", "4"]
_DEFAULT_BITS: Bits = "4"


def simulate(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="PROFILE",
            help="A profile, or a trace of `run --record-trace`.",
            show_default="newest in profiles/",
        ),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            metavar="SIZE,...",
            help="Budgets: 10%..100% of the experts in steps of 10, single shares, or bytes of "
            "the whole process (4GiB, or min: the least that works).",
            show_default="10%..100%",
        ),
    ] = None,
    eviction: Annotated[
        list[str] | None,
        typer.Option(
            "--eviction",
            metavar="NAME[:KEY=N,...]",
            help="A policy as `run` takes it; repeat it for several.",
            show_default="all",
        ),
    ] = None,
    bits: Annotated[
        Bits | None,
        typer.Option("--bits", help="Bits of the experts.", show_default="4"),
    ] = None,
    skeleton_bits: Annotated[
        Bits, typer.Option("--skeleton-bits", help="Bits of the other matrices.")
    ] = "native",
    context: Annotated[
        int,
        typer.Option(
            "--context",
            metavar="N",
            min=1,
            max=MAX_CONTEXT,
            help="Positions that budgets in bytes have room for.",
        ),
    ] = 4096,
    hardware: HardwareOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw hit rate and tokens/s against the budget: .png, .svg or .html.",
            show_default=False,
        ),
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Every figure of every row, not only two.")
    ] = False,
    profiles: ProfilesOption = DEFAULT_FOLDER,
    json: JsonOption = False,
) -> None:
    """Replay a trace under every budget and eviction policy. Needs no model."""
    with open_output(as_json=json) as output:
        from moe_tool.policies.eviction import parse_eviction
        from moe_tool.simulator.simulate import default_choices

        names = eviction or ["all"]
        if names == ["all"]:
            choices = default_choices(parse_eviction)
        else:
            choices = [parse_eviction(name) for name in names]
        if plot is not None:
            from moe_tool.reports.simulation_plot import require_plot_path

            require_plot_path(plot)
        machine_profile = chosen_hardware(hardware, profiles, output)
        source = source or newest_profile(profiles, output)
        if _is_run_trace(source):
            if memory or plot is not None:
                raise UsageError(
                    f"{source} is the trace of one run at one budget",
                    hint="--memory and --plot go with a profile",
                )
            _simulate_run(source, machine_profile, choices, output)
            return

        from moe_tool.formats.profile_hdf5 import ProfileReader

        with ProfileReader.open(source) as profile:
            of_bits = f"experts at {_words(bits or _DEFAULT_BITS)}"
            if bits is None:
                of_bits += "; --bits native or 8 for others"
            bits = bits or _DEFAULT_BITS
            machine = _machine(profile, machine_profile, bits, skeleton_bits, output)
            budgets = _budgets(memory or ["10%..100%"], profile, bits, skeleton_bits, context)
            rows = _simulate_profile(profile, machine, choices, budgets, details, of_bits, output)
            if plot is not None:
                title = (
                    f"{profile.header.identity.name}, {_words(bits)}, decoding on "
                    f"{machine_profile.name}"
                )
                _draw(plot, rows, profile, machine, title, output)


def _words(bits: Bits) -> str:
    return "native precision" if bits == "native" else f"{bits} bits"


def _is_run_trace(path: Path) -> bool:
    from moe_tool.formats.run_trace_hdf5 import is_run_trace

    return is_run_trace(path)


def _machine(
    profile: "ProfileReader",
    hardware: "HardwareProfile",
    bits: Bits,
    skeleton_bits: Bits,
    output: Output,
) -> "Machine":
    from moe_tool.planning.model_costs import model_costs
    from moe_tool.planning.pinning import rank_experts
    from moe_tool.simulator.simulate import Machine

    shape, skeleton = profile.header.shape, profile.header.skeleton
    if skeleton is None:
        output.say(
            "the profile does not say what the model has beside its experts, whose time is left "
            "out; one that moe-tool profile records now does"
        )
    costs = model_costs(shape, skeleton, hardware, bits=bits, skeleton_bits=skeleton_bits)
    ranked = rank_experts({layer: profile.statistics(layer) for layer in shape.layers})
    positions = {layer: at for at, layer in enumerate(shape.layers)}
    return Machine(
        record_bytes=costs.record_bytes,
        n_slots_min=min_slots(shape.top_k, shape.experts * len(shape.layers)),
        costs=costs.calls,
        hottest=[positions[layer] * shape.experts + expert for layer, expert in ranked],
    )


def _budgets(
    texts: Sequence[str],
    profile: "ProfileReader",
    bits: Bits,
    skeleton_bits: Bits,
    context: int,
) -> "list[Budget]":
    from moe_tool.errors import ArtifactVersionError
    from moe_tool.planning.memory_account import account, fixed_memory, rooms_of_bits
    from moe_tool.simulator.budget_list import parse_budgets
    from moe_tool.simulator.simulate import Budget

    shape, skeleton = profile.header.shape, profile.header.skeleton
    rooms, fixed = rooms_of_bits(shape, bits), None
    if skeleton is not None:
        fixed = fixed_memory(shape, skeleton, skeleton_bits=skeleton_bits, context=context)
    found = []
    for request in parse_budgets(texts):
        if request.kind == "share":
            n_slots = sum(split_slots(math.floor(request.share * rooms[0].n_experts), rooms))
        elif fixed is None:
            raise ArtifactVersionError(
                f"--memory {request}: {profile.path} does not say what else takes memory",
                hint="record it again with moe-tool profile, or give a share: --memory 50%",
            )
        else:
            n_slots = account(request, fixed, rooms).n_slots
        found.append(Budget(label=str(request), n_slots=n_slots))
    return sorted(found, key=lambda budget: budget.n_slots)


def _simulate_profile(
    profile: "ProfileReader",
    machine: "Machine",
    choices: "Sequence[EvictionChoice]",
    budgets: "Sequence[Budget]",
    details: bool,
    of_bits: str,
    output: Output,
) -> "list[SimulatedRow]":
    from moe_tool.reports.simulation_table import (
        details_table,
        hit_rate_table,
        prefetch_table,
        prompt_table,
    )
    from moe_tool.simulator.profile_trace import decode_trace, part_to_replay, prompt_trace
    from moe_tool.simulator.replay import Replayer
    from moe_tool.simulator.simulate import (
        best_policy,
        find_cliff,
        find_slower,
        rows_by_policy,
        simulate_decoding,
        simulate_prefetch,
        simulate_prompts,
    )

    part = part_to_replay(profile)
    hints = {hint for choice in choices for hint in choice.hints}
    trace = decode_trace(
        profile, part, with_scores="scores" in hints, with_guesses=len(profile.layers) > 1
    )
    if not trace.n_forwards:
        raise UsageError(f"{profile.path} has no tokens to replay")
    replayer = Replayer(trace)
    rows, rate = simulate_decoding(replayer, choices, budgets, machine, progress=output.progress)
    cliff = find_cliff(trace, machine.record_bytes)
    n_experts = trace.n_keys
    output.show(
        f"decoding {trace.n_forwards} {part} tokens, one at a time, {of_bits}: hits and tokens/s",
        hit_rate_table(rows_by_policy(rows)),
    )
    missing = _missing_rows(choices, budgets, rows)
    if missing:
        output.say(missing)
    best = [best_policy(rows, budget.label) for budget in budgets]
    output.show("", "the best policy of each budget", details_table(rows if details else best))
    output.say(
        f"one token calls {cliff.experts:.0f} of {n_experts} experts "
        f"({format_bytes(cliff.bytes)}, {cliff.experts / n_experts:.0%}): below that a cache that "
        "keeps what was used last hits little or nothing"
    )
    warnings = find_slower(rows)
    for sentence in warnings:
        output.say(f"warning: {sentence}")
    prompts, n_tokens = prompt_trace(profile, part)
    prompt_rows = simulate_prompts(prompts, n_tokens, choices, budgets, machine)
    output.show(
        "", "prompts in chunks of 256 tokens: hits and bytes read per token",
        prompt_table(prompt_rows),
    )  # fmt: skip
    # A chunk may name more experts than there are slots; a part per layer can then beat Belady's.
    unheard = [choice.name for choice in choices if "scores" in choice.hints]
    output.say(
        "no belady here, which bounds nothing where a chunk names more experts than fit"
        + (f"; no {', '.join(unheard)}, whose scores are per token" if unheard else "")
    )
    prefetch_rows = [
        simulate_prefetch(replayer, choice, budget, machine, depth=depth)
        for budget, row in _some(list(zip(budgets, best, strict=True)))
        if row.hit_rate < 1
        for choice in choices
        if choice.name == row.eviction and trace.guesses is not None
        for depth in (1, 2, 3)
    ]
    if prefetch_rows:
        output.show("", "reading ahead, under the best policy", prefetch_table(prefetch_rows))
        paying = [row for row in prefetch_rows if row.pays]
        output.say(
            "prefetch stays off: the stall that it saves is below 2 % of the time, or it costs more"
            if not paying
            else "prefetch pays at "
            + ", ".join(dict.fromkeys(f"{row.memory} (depth {row.depth})" for row in paying))
        )
    output.say(f"{rate / 1e6:.1f} million accesses per second, {output.seconds:.1f} s")
    output.result(
        {
            "profile": profile.path,
            "part": part,
            "tokens": trace.n_forwards,
            "rows": [asdict(row) for row in rows],
            "prompt_rows": [asdict(row) for row in prompt_rows],
            "prefetch_rows": [asdict(row) for row in prefetch_rows],
            "cliff": asdict(cliff),
            "warnings": warnings,
            "accesses_per_second": rate,
        }
    )
    return rows


def _missing_rows(
    choices: "Sequence[EvictionChoice]",
    budgets: "Sequence[Budget]",
    rows: "Sequence[SimulatedRow]",
) -> str:
    """Why there are dashes; empty where there are none."""
    there = {(row.memory, row.eviction) for row in rows}
    gaps = [
        (budget.label, choice.name)
        for budget in budgets
        for choice in choices
        if choice.per_layer and (budget.label, choice.name) not in there
    ]
    if not gaps:
        return ""
    labels, names = (", ".join(dict.fromkeys(words)) for words in zip(*gaps, strict=True))
    return f"-: at {labels} a layer's part of {names} would not hold one token's experts"


def _some(pairs: "list[tuple[Budget, SimulatedRow]]") -> "list[tuple[Budget, SimulatedRow]]":
    """At most three, spread over all."""
    if len(pairs) <= 3:
        return pairs
    return [pairs[len(pairs) * part // 4] for part in (1, 2, 3)]


def _draw(
    path: Path,
    rows: "Sequence[SimulatedRow]",
    profile: "ProfileReader",
    machine: "Machine",
    title: str,
    output: Output,
) -> None:
    from moe_tool.formats.atomic_write import atomic_write_bytes
    from moe_tool.reports.simulation_plot import drawn_plot
    from moe_tool.simulator.simulate import rows_by_policy

    shape = profile.header.shape
    cliff_bytes = len(shape.layers) * shape.top_k * machine.record_bytes
    data = drawn_plot(path, rows_by_policy(rows), title=title, cliff_bytes=cliff_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, data)
    output.say(f"wrote {path}")


def _simulate_run(
    path: Path,
    hardware: "HardwareProfile",
    choices: "Sequence[EvictionChoice]",
    output: Output,
) -> None:
    from moe_tool.formats.run_trace_hdf5 import read_run_trace
    from moe_tool.planning.compare_run import compare_run
    from moe_tool.reports.run_comparison_table import comparison_table, policies_table

    header, calls = read_run_trace(path)
    report = compare_run(header, calls, hardware, choices)
    output.show(
        f"{header.identity.name}: {header.n_slots} expert slots, {header.eviction}, prefetch "
        f"{header.prefetch}, {header.decode_tokens} tokens decoded",
        comparison_table(report),
    )
    output.show("", "the same calls under other policies", policies_table(report.policies))
    output.result(asdict(report))
