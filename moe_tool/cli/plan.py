"""`moe-tool plan`: a profile, a machine and a memory budget in, the best plan out."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER, plan_path
from moe_tool.budget.request import EVERY_EXPERT, MemoryRequest, parse_memory
from moe_tool.budget.sizes import format_bytes, parse_bytes
from moe_tool.cli.chosen_hardware import chosen_hardware
from moe_tool.cli.console import Output, open_output
from moe_tool.cli.newest_profile import newest_profile
from moe_tool.cli.options import (
    MAX_CONTEXT,
    HardwareOption,
    JsonOption,
    OfflineOption,
    ProfilesOption,
)
from moe_tool.cli.plan_mixed import plan_mixed
from moe_tool.errors import UsageError

if TYPE_CHECKING:
    from moe_tool.artifacts.hardware_profile import HardwareProfile
    from moe_tool.artifacts.pack_plan import PackPlan
    from moe_tool.errors import BudgetError
    from moe_tool.planning.build_plan import PlanReport

BitsChoice = Literal["auto", "native", "8", "4", "mixed"]


def plan(
    profile: Annotated[
        Path | None,
        typer.Argument(metavar="PROFILE", help="A profile.", show_default="newest in profiles/"),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Budget of the whole process: 8GiB, or 50% of the experts beside the rest; repeat "
            "it to see the curve.",
            show_default=False,
        ),
    ] = None,
    hardware: HardwareOption = None,
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            metavar="RATE",
            help="What the disk gives per second, e.g. 3GB, instead of the machine's own.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        BitsChoice,
        typer.Option(
            "--bits",
            help="Bits of the experts; auto: the fastest within --max-loss; mixed: to each "
            "expert its own, the least expected loss that fits into --memory, or the fewest bytes "
            "within --max-kl.",
        ),
    ] = "auto",
    average_bits: Annotated[
        float | None,
        typer.Option(
            "--average-bits",
            metavar="BITS",
            help="Mixed bits: what the experts may have on average, e.g. 2.5.",
            show_default=False,
        ),
    ] = None,
    quantizer: Annotated[
        str,
        typer.Option(
            "--quantizer",
            metavar="NAME",
            help="Mixed bits: what `pack` is to round with, {quantizers}. rtn is priced by the "
            "profile; for another one each width is measured in a pass over the model and kept.",
        ),
    ] = "rtn",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Mixed bits: the checkpoint, where a quantizer has to be measured.",
            show_default="by the profile's name",
        ),
    ] = None,
    skeleton_bits: Annotated[
        Literal["native", "8", "4"],
        typer.Option("--skeleton-bits", help="Bits of the other matrices."),
    ] = "native",
    max_loss: Annotated[
        str | None,
        typer.Option(
            "--max-loss",
            metavar="SHARE",
            help="Perplexity that bits and lossy answers to misses may be predicted to add, e.g. "
            "2%.",
            show_default="1% for bits alone, misses are answered exactly",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            metavar="NATS",
            help="The same limit as divergence from the checkpoint, nats per token, e.g. 0.01. "
            "Under a limit cheaper forms of experts may answer misses.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            "--context", metavar="N", min=1, max=MAX_CONTEXT, help="Tokens of prompt and text."
        ),
    ] = 4096,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The plan.", show_default="profiles/NAME.plan.json"
        ),
    ] = None,
    profiles: ProfilesOption = DEFAULT_FOLDER,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Choose how to pack and run a model in a memory budget."""
    with open_output(as_json=json) as output:
        is_mixed = bits == "mixed" or average_bits is not None
        if average_bits is not None and bits not in ("auto", "mixed"):
            raise UsageError(
                f"--bits {bits} and --average-bits contradict", hint="give one of them"
            )
        if average_bits is not None and (max_kl is not None or max_loss is not None):
            raise UsageError(
                "--average-bits and a limit of loss both say how many bits",
                hint="--average-bits 2.5, or --bits mixed with --max-kl 0.01",
            )
        from moe_tool.quantizers.registry import parse_quantizer

        parse_quantizer(quantizer)
        _require_sense(is_mixed, quantizer, model, memory or [])
        loss = _share(max_loss or "1%")
        if max_loss is not None:
            if max_kl is not None:
                raise UsageError("--max-loss and --max-kl say the same", hint="give one of them")
            max_kl = math.log1p(loss)
        machine = chosen_hardware(hardware, profiles, output)
        if disk is not None:
            machine = _with_disk(machine, disk)
        profile = profile or newest_profile(profiles, output)

        from moe_tool.formats.profile_hdf5 import ProfileReader
        from moe_tool.planning.build_plan import build_plan, plan_curve
        from moe_tool.planning.plan_request import PlanRequest
        from moe_tool.planning.plan_sources import read_sources

        budgets = [parse_memory(text) for text in memory or []] or [EVERY_EXPERT]
        request = PlanRequest(
            memory=budgets[0],
            bits=None if bits in ("auto", "mixed") else bits,
            skeleton_bits=skeleton_bits,
            max_loss=loss,
            max_kl=max_kl,
            context=context,
        )
        if is_mixed:
            mixed, fields = plan_mixed(
                profile,
                machine,
                request,
                average_bits=average_bits,
                quantizer=quantizer,
                model=model,
                profiles=profiles,
                offline=offline,
                output=output,
            )
            out = _write(mixed, out or plan_path(profiles, profile))
            output.say(f"wrote {out}; next: {_pack_command(mixed, out, model)}")
            output.result({"plan_file": out, **fields})
            return
        with ProfileReader.open(profile) as reader:
            sources = read_sources(reader)

            def build(asked: MemoryRequest) -> "PlanReport":
                return build_plan(
                    sources, machine, replace(request, memory=asked), progress=output.progress
                )

            if len(budgets) > 1:
                _show_curve(*plan_curve(build, budgets), output)
                return
            report = build(budgets[0])
        out = _write(report.plan, out or plan_path(profiles, profile))
        _show(report, output)
        output.say(f"wrote {out}; next: {_pack_command(report.plan, out)}")
        output.result({"plan_file": out, **_fields(report)})


def _require_sense(
    is_mixed: bool, quantizer: str, model: str | None, memory: Sequence[str]
) -> None:
    """Refuse options that would do nothing, and one that is missing."""
    if not is_mixed and (quantizer != "rtn" or model is not None):
        raise UsageError(
            "--quantizer and --model are for mixed bits; pack has a --quantizer of its own",
            hint="--average-bits 2.5, or --bits mixed with --memory SIZE",
        )
    if not is_mixed and not memory:
        raise UsageError("for which memory? --memory is missing", hint="--memory 8GiB")
    if is_mixed and len(memory) > 1:
        raise UsageError("mixed bits: one --memory at a time", hint="--memory 8GiB")


def _write(plan: "PackPlan", out: Path) -> Path:
    from moe_tool.formats.json_artifact import write_json_artifact

    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_artifact(out, plan)
    return out


def _show(report: "PlanReport", output: Output) -> None:
    from moe_tool.reports.plan_table import lines_table

    plan, prediction = report.plan, report.plan.prediction
    output.show(
        f"{plan.identity.name} in {format_bytes(plan.memory_bytes)} on {plan.hardware}: experts at "
        f"{plan.bits}, others at {plan.skeleton_bits}, {_answers_to_misses(plan)}",
        f"predicted: {prediction.tokens_per_second:.2f} tokens/s (+-{prediction.error:.0%}), "
        f"{_reading(report)}, {prediction.hit_rate:.1%} hits, "
        f"{prediction.seconds_to_first_token:.1f} s to the first token of a prompt of "
        f"{prediction.prompt_tokens}",
        "",
        *_compared(report),
        "",
        f"memory, {format_bytes(plan.memory_bytes)}",
        lines_table(plan.lines),
        "",
    )
    for each in report.neighbours:
        output.show(
            f"with {format_bytes(each.memory_bytes)} it would be {each.tokens_per_second:.2f} "
            f"tokens/s, {each.ratio:.2f} times as much"
            + ("" if each.kl is None else f", expected KL {each.kl:.2g}")
        )
    for note in report.notes:
        output.say(note)


def _compared(report: "PlanReport") -> list[Any]:
    """What the plan was chosen from: under a lossy policy the forms in memory, else the evictions
    that were replayed."""
    from moe_tool.reports.plan_table import forms_table, rows_to_show
    from moe_tool.reports.simulation_table import details_table

    if report.plan.policy is not None:
        return ["who is in memory", forms_table(report.plan)]
    return [*_heading(report), details_table(rows_to_show(report.best, report.lru, report.bound))]


def _answers_to_misses(plan: "PackPlan") -> str:
    if plan.policy is None:
        return f"eviction {plan.eviction}, prefetch {plan.prefetch}"
    return f"policy {plan.policy}, replicas {plan.replicas}"


def _heading(report: "PlanReport") -> list[str]:
    if len(report.best) == 1:
        return ["every expert stays in memory"]
    return ["the best that were replayed, plain lru, and belady, the bound that nothing can reach"]


def _reading(report: "PlanReport") -> str:
    read = report.plan.prediction.bytes_per_token
    if report.plan.policy is not None and not read:
        return "nothing read"
    return f"{format_bytes(read)} read per token" if read else "nothing read once the cache is full"


def _pack_command(plan: "PackPlan", path: Path, model: str | None = None) -> str:
    """Return what to type next; a bundle that is there may be of other bits, and stays."""
    from moe_tool.models.locate import model_to_type

    bundle = "planned/" if Path("bundle").exists() else "bundle/"
    return (
        f"moe-tool pack {model or model_to_type(plan.identity.name)} --plan {path} --out {bundle}"
    )


def _show_curve(
    reports: "Sequence[PlanReport]",
    refused: "Sequence[tuple[str, BudgetError]]",
    output: Output,
) -> None:
    from moe_tool.reports.plan_table import curve_table

    for memory, error in refused:
        output.say(f"{memory}: {error.message.splitlines()[0]}")
    if not reports:
        raise refused[-1][1]
    output.show(curve_table([report.plan for report in reports]))
    output.say("no plan was written: give one --memory for that")
    output.result(
        {
            "plans": [_fields(report) for report in reports],
            "refused": {memory: error.message for memory, error in refused},
        }
    )


def _fields(report: "PlanReport") -> dict[str, Any]:
    fields = asdict(report)
    fields["plan"] = report.plan.model_dump(mode="json")
    return fields


def _share(text: str) -> float:
    word = text.strip()
    try:
        value = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"--max-loss {text} is no share", hint="--max-loss 1%") from error
    if not 0 <= value < 100:
        raise UsageError(f"--max-loss {text} is no share", hint="--max-loss 1%")
    return value


def _with_disk(machine: "HardwareProfile", text: str) -> "HardwareProfile":
    rate = parse_bytes(text.strip().removesuffix("/s"))
    if rate < 1:
        raise UsageError(f"--disk {text}: no data ever comes", hint="--disk 3GB")
    disk = tuple(row.model_copy(update={"bytes_per_s": float(rate)}) for row in machine.disk)
    return machine.model_copy(update={"disk": disk, "name": f"{machine.name}, disk {text}"[:256]})
