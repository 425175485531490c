"""`moe-tool plan --average-bits`: every expert gets its own number of bits."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moe_tool.artifact_folder import bit_prices_path
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output
from moe_tool.errors import MoeToolError, NotFoundError

if TYPE_CHECKING:
    from moe_tool.artifacts.bit_prices import BitPrices
    from moe_tool.artifacts.hardware_profile import HardwareProfile
    from moe_tool.artifacts.pack_plan import PackPlan, Quantizer
    from moe_tool.formats.profile_hdf5 import ProfileReader
    from moe_tool.planning.mixed_plan import MixedReport
    from moe_tool.planning.plan_request import PlanRequest


def plan_mixed(
    profile: Path,
    machine: "HardwareProfile",
    request: "PlanRequest",
    *,
    average_bits: float | None,
    quantizer: "Quantizer",
    model: str | None,
    profiles: Path,
    offline: bool,
    output: Output,
) -> tuple["PackPlan", dict[str, object]]:
    """Return the plan and the fields of its report, which is shown.

    Args:
        profile: that is planned from.
        machine: that it is for.
        request: budget and limits.
        average_bits: None: by the request's limit of loss, or its memory.
        quantizer: that `pack` is to use.
        model: where the checkpoint is, if errors have to be measured; None: by the profile's name.
        profiles: folder where measured errors are kept.
        offline: never touch the network.
        output: of the verb.
    """
    from moe_tool.formats.profile_hdf5 import ProfileReader
    from moe_tool.planning.mixed_plan import build_mixed_plan
    from moe_tool.planning.plan_sources import read_sources
    from moe_tool.quantizers.registry import QUANTIZERS

    with ProfileReader.open(profile) as reader:
        prices = None
        if not QUANTIZERS[quantizer].is_profiled:
            prices = _measured_prices(
                reader, quantizer, model, profiles, offline=offline, output=output
            )
        sources = read_sources(reader)
        report = build_mixed_plan(
            sources, machine, request, average_bits=average_bits, prices=prices
        )
    _show(report, output)
    fields = asdict(report)
    fields["plan"] = report.plan.model_dump(mode="json")
    return report.plan, fields


def _measured_prices(
    reader: "ProfileReader",
    quantizer: "Quantizer",
    model: str | None,
    profiles: Path,
    *,
    offline: bool,
    output: Output,
) -> "BitPrices":
    """Those that are kept beside the profile, else measured now."""
    from moe_tool.artifacts.bit_prices import BitPrices
    from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
    from moe_tool.models.locate import locate_model
    from moe_tool.packing.measure_bit_prices import measure_bit_prices

    path = bit_prices_path(profiles, reader.path, quantizer)
    if path.exists():
        kept = read_json_artifact(path, BitPrices)
        if kept.profile_sha256 == reader.sha256 and kept.quantizer == quantizer:
            output.say(f"bit prices: {path}, measured with {quantizer}")
            return kept
        output.say(f"bit prices: {path} is of another profile and is measured again")
    name = reader.header.identity.name
    try:
        located = locate_model(model or name, offline=offline, announce=output.say)
    except MoeToolError as error:
        if model is not None:
            raise
        raise NotFoundError(
            f"what {quantizer} loses at each width is measured on the model, and {name} was not "
            "found by its name",
            hint="add --model PATH, the checkpoint that was profiled",
        ) from error
    output.say(
        f"bit prices: every expert at 1 to 4 bits with {quantizer}, one pass, kept for later"
    )
    found = measure_bit_prices(located, reader, quantizer, progress=output.progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_artifact(path, found)
    output.say(f"wrote {path}")
    return found


def _show(report: "MixedReport", output: Output) -> None:
    from moe_tool.reports.plan_table import allocations_table, lines_table

    plan, prediction = report.plan, report.plan.prediction
    chosen = report.allocations[0]
    reading = (
        f"{format_bytes(prediction.bytes_per_token)} read per token"
        if prediction.bytes_per_token
        else "nothing read once all are there"
    )
    output.show(
        f"{plan.identity.name} in {format_bytes(plan.memory_bytes)} on {plan.hardware}: experts at "
        f"{chosen.average_bits:.2f} bits on average by {plan.quantizer}, "
        f"{format_bytes(chosen.expert_bytes)}, others at {plan.skeleton_bits}",
        f"predicted: {prediction.tokens_per_second:.2f} tokens/s (+-{prediction.error:.0%}), "
        f"{reading}, expected KL {chosen.nats:.2g}",
        "",
        "the same bits handed out otherwise",
        allocations_table(report.allocations),
        "",
        f"memory, {format_bytes(plan.memory_bytes)}",
        lines_table(plan.lines),
        "",
    )
    for note in report.notes:
        output.say(note)
