"""`moe-tool plan`: find the best plan for a profile, a machine and a memory budget."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_tool.artifact_folder import plan_path
from moe_tool.budget.request import EVERY_EXPERT, MemoryRequest, parse_memory
from moe_tool.budget.sizes import parse_bytes
from moe_tool.cli.chosen_hardware import chosen_hardware
from moe_tool.cli.console import Output
from moe_tool.cli.newest_profile import newest_profile
from moe_tool.cli.plan_options import PlanArguments
from moe_tool.cli.show_plan import pack_command, plan_fields, show_curve, show_plan
from moe_tool.cli.verb import options_from, verb
from moe_tool.errors import UsageError

if TYPE_CHECKING:
    from moe_tool.artifacts.hardware_profile import HardwareProfile
    from moe_tool.errors import BudgetError
    from moe_tool.planning.build_plan import PlanReport
    from moe_tool.planning.plan_request import PlanRequest

_DEFAULT_LOSS = 0.01


@verb
def plan(given: PlanArguments, output: Output) -> None:
    """Choose how to pack and run a model in a memory budget."""
    budgets = _budgets(
        given.memory or [], is_mixed=given.bits == "mixed" or given.average_bits is not None
    )
    share = None if given.max_loss is None else _share(given.max_loss)

    from moe_tool.formats.claimed_artifact import require_unclaimed
    from moe_tool.formats.json_artifact import write_json_artifact
    from moe_tool.planning.plan_request import PlanRequest, check_request
    from moe_tool.planning.published_bits import parse_cost
    from moe_tool.quantizers.registry import parse_quantizer

    request = options_from(
        given,
        PlanRequest,
        memory=budgets[0],
        bits=None if given.bits == "auto" else given.bits,
        cost=parse_cost(given.cost),
        quantizer=parse_quantizer(given.quantizer).name,
        max_loss=_DEFAULT_LOSS if share is None else share,
        max_kl=_kl_limit(share, given.max_kl),
    )
    check_request(request)
    if given.model is not None and not request.is_mixed:
        raise UsageError("--model is for mixed bits", hint="leave it out, or --bits mixed")
    machine = _with_disk(chosen_hardware(given.hardware, given.profiles, output), given.disk)
    profile = given.profile or newest_profile(given.profiles, output)
    reports, refused = _plans(given, profile, machine, request, budgets, output)
    if len(budgets) > 1:
        show_curve(reports, refused, output)
        return
    if refused:
        raise refused[0][1]
    report = reports[0]
    default = plan_path(given.profiles, profile)
    out = given.out or require_unclaimed(default, report.plan.identity)
    write_json_artifact(out, report.plan)
    show_plan(report, output)
    output.say(f"wrote {out}; next: {pack_command(report.plan, out, given.model)}")
    output.result({"plan_file": out, **plan_fields(report)})


def _kl_limit(share: float | None, max_kl: float | None) -> float | None:
    """Return the KL limit that --max-loss or --max-kl sets."""
    if share is None:
        return max_kl
    if max_kl is not None:
        raise UsageError("--max-loss and --max-kl set the same limit", hint="give one of them")
    return math.log1p(share)


def _budgets(texts: Sequence[str], *, is_mixed: bool) -> list[MemoryRequest]:
    """Return the requested budgets; all experts for mixed bits without --memory."""
    if not texts and not is_mixed:
        raise UsageError("--memory is required", hint="--memory 8GiB")
    if is_mixed and len(texts) > 1:
        raise UsageError("mixed bits: one --memory at a time", hint="--memory 8GiB")
    return [parse_memory(text) for text in texts] or [EVERY_EXPERT]


def _plans(
    given: PlanArguments,
    profile: Path,
    machine: "HardwareProfile",
    request: "PlanRequest",
    budgets: Sequence[MemoryRequest],
    output: Output,
) -> "tuple[list[PlanReport], list[tuple[str, BudgetError]]]":
    from moe_tool.formats.profile_hdf5 import ProfileReader
    from moe_tool.packing.kept_bit_prices import kept_bit_prices
    from moe_tool.planning.build_plan import build_plan, plan_curve
    from moe_tool.planning.plan_sources import read_sources
    from moe_tool.quantizers.registry import QUANTIZERS

    with ProfileReader.open(profile) as reader:
        prices = None
        if not QUANTIZERS[request.quantizer].is_profiled:
            prices = kept_bit_prices(
                reader,
                request.quantizer,
                folder=given.profiles,
                model=given.model,
                offline=given.offline,
                announce=output.say,
                progress=output.progress,
            )
        sources = read_sources(reader)

        def build(memory: MemoryRequest) -> "PlanReport":
            asked = replace(request, memory=memory)
            return build_plan(sources, machine, asked, prices=prices, progress=output.progress)

        return plan_curve(build, budgets)


def _share(text: str) -> float:
    word = text.strip()
    try:
        value = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"--max-loss {text} is not a share", hint="--max-loss 1%") from error
    if not 0 <= value < 100:
        raise UsageError(f"--max-loss {text} is not a share", hint="--max-loss 1%")
    return value


def _with_disk(machine: "HardwareProfile", text: str | None) -> "HardwareProfile":
    if text is None:
        return machine
    rate = parse_bytes(text.strip().removesuffix("/s"))
    if rate < 1:
        raise UsageError(f"--disk {text}: at least 1 byte per second is needed", hint="--disk 3GB")
    disk = tuple(row.model_copy(update={"bytes_per_s": float(rate)}) for row in machine.disk)
    return machine.model_copy(update={"disk": disk, "name": f"{machine.name}, disk {text}"[:256]})
