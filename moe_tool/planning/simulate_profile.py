"""Story of `simulate`: a profile's tokens replayed under every budget and policy."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import SkeletonBits
from moe_tool.artifacts.simulation_report import Cliff, SimulationReport, best_policy
from moe_tool.budget.slots import split_slots
from moe_tool.errors import ArtifactVersionError, UsageError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.planning.memory_account import fixed_memory, rooms_of_bits
from moe_tool.planning.model_costs import model_costs, replay_machine
from moe_tool.planning.pinning import rank_experts
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.progress import SILENT, Progress
from moe_tool.simulator.budget_list import parse_budgets
from moe_tool.simulator.profile_trace import decode_trace, part_to_replay, prompt_trace
from moe_tool.simulator.replay import Replayer
from moe_tool.simulator.simulate import (
    Budget,
    Machine,
    find_slower,
    simulate_decoding,
    simulate_prefetch,
    simulate_prompts,
)

_PREFETCH_BUDGETS = 3
_PREFETCH = ("next-layer", "stacked:depth=2", "stacked:depth=3")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """Budgets, policies and precision to replay."""

    choices: Sequence[EvictionChoice]
    memory: Sequence[str] = ("10%..100%",)
    """Budgets: ranges of shares, shares, or sizes of the whole process"""
    bits: SkeletonBits = "native"
    skeleton_bits: SkeletonBits = "native"
    context: int = 4096
    """Positions that budgets in bytes have room for"""


def simulate_profile(
    profile: ProfileReader,
    hardware: HardwareProfile,
    options: SimulateOptions,
    *,
    progress: Progress = SILENT,
) -> SimulationReport:
    """Replay decoding and prompts, and prefetch under the best policies.

    Raises:
        UsageError: the profile has no tokens, or a budget is out of range.
        BudgetError: a budget in bytes is too small for the memory beside the experts.
        ArtifactVersionError: a budget in bytes with a profile that lacks the skeleton's sizes.
    """
    machine = _machine(profile, hardware, options, progress)
    budgets, choices = _budgets(profile, options), options.choices
    part = part_to_replay(profile)
    hints = {hint for choice in choices for hint in choice.hints}
    trace = decode_trace(
        profile, part, with_scores="scores" in hints, with_guesses=len(profile.layers) > 1
    )
    if not trace.n_forwards:
        raise UsageError(f"{profile.path} has no tokens to replay")
    replayer = Replayer(trace)
    rows, rate = simulate_decoding(replayer, choices, budgets, machine, progress=progress)
    prompts, n_tokens = prompt_trace(profile, part)
    there = {(row.memory, row.eviction) for row in rows}
    asked = [
        (budget.label, choice.name) for budget in budgets for choice in choices if choice.per_layer
    ]
    return SimulationReport(
        profile=profile.path,
        model=profile.header.identity.name,
        hardware=hardware.name,
        bits=options.bits,
        part=part,
        tokens=trace.n_forwards,
        experts=trace.n_keys,
        rows=tuple(rows),
        gaps=tuple(pair for pair in asked if pair not in there),
        prompt_rows=tuple(simulate_prompts(prompts, n_tokens, choices, budgets, machine)),
        unheard=tuple(choice.name for choice in choices if "scores" in choice.hints),
        prefetch_rows=tuple(
            simulate_prefetch(replayer, choice, budget, machine, prefetch=prefetch)
            for budget in (() if trace.guesses is None else _some(budgets))
            if (best := best_policy(rows, budget.label)).hit_rate < 1
            for choice in choices
            if choice.name == best.eviction
            for prefetch in _PREFETCH
        ),
        cliff=Cliff(experts=trace.cycle, bytes=round(trace.cycle * machine.record_bytes)),
        warnings=tuple(find_slower(rows)),
        accesses_per_second=rate,
    )


def _some(budgets: Sequence[Budget]) -> Sequence[Budget]:
    """Return at most three budgets, spread over all."""
    n, count = _PREFETCH_BUDGETS, len(budgets)
    if count <= n:
        return budgets
    return [budgets[count * part // (n + 1)] for part in range(1, n + 1)]


def _machine(
    profile: ProfileReader,
    hardware: HardwareProfile,
    options: SimulateOptions,
    progress: Progress,
) -> Machine:
    shape, skeleton = profile.header.shape, profile.header.skeleton
    if skeleton is None:
        progress.note(
            "the profile lacks the model's sizes outside the experts, whose time is left out; "
            "record it again with moe-tool profile to include it"
        )
    costs = model_costs(
        profile.header, hardware, bits=options.bits, skeleton_bits=options.skeleton_bits
    )
    ranked = rank_experts({layer: profile.statistics(layer) for layer in shape.layers})
    return replay_machine(shape, costs, ranked)


def _budgets(profile: ProfileReader, options: SimulateOptions) -> list[Budget]:
    shape, skeleton = profile.header.shape, profile.header.skeleton
    rooms, fixed = rooms_of_bits(profile.header, options.bits), None
    if skeleton is not None:
        fixed = fixed_memory(
            shape, skeleton, skeleton_bits=options.skeleton_bits, context=options.context
        )
    found = []
    for request in parse_budgets(options.memory):
        if request.kind == "share":
            n_slots = sum(split_slots(int(request.share * rooms[0].n_experts), rooms))
        elif fixed is None:
            raise ArtifactVersionError(
                f"--memory {request}: {profile.path} lacks the model's sizes outside the experts",
                hint="record it again with moe-tool profile, or give a share: --memory 50%",
            )
        else:
            n_slots = fixed.within(request, rooms).n_slots
        found.append(Budget(label=str(request), n_slots=n_slots))
    return sorted(found, key=lambda budget: budget.n_slots)
