"""Arguments of `moe-tool plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER
from moe_tool.cli.options import (
    MAX_CONTEXT,
    HardwareOption,
    OfflineOption,
    ProfilesOption,
    RobustOption,
)

BitsChoice = Literal["auto", "native", "8", "4", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanArguments:
    profile: Annotated[
        Path | None,
        typer.Argument(metavar="PROFILE", help="A profile.", show_default="newest in profiles/"),
    ] = None
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="Budget of the whole process: 8GiB, or 50% (of the experts, plus everything "
            "fixed); repeat it to compare budgets.",
        ),
    ] = None
    hardware: HardwareOption = None
    disk: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", help="Disk rate per second, e.g. 3GB, instead of the machine's."
        ),
    ] = None
    bits: Annotated[
        BitsChoice,
        typer.Option(
            help="Bits of the experts; auto: the fastest within --max-loss; mixed: bits per "
            "expert, with the least expected loss that fits into --memory, or the fewest bytes "
            "within --max-kl."
        ),
    ] = "auto"
    average_bits: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="Mixed bits: average bits per expert weight, e.g. 2.5."),
    ] = None
    cost: Annotated[
        str,
        typer.Option(
            metavar="COST",
            help="Average bits: what is least. kl: the expected divergence, over all layers; "
            "published:alpha=1,beta=1,gamma=2: Mixture Compressor's program (arXiv:2410.06270), "
            "layer by layer, 1 to 3 bits, exactly the average.",
        ),
    ] = "kl"
    quantizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Mixed bits: quantizer that `pack` will use, {quantizers}. Errors of rtn are in "
            "the profile; those of another one are measured in a pass over the model and kept.",
        ),
    ] = "rtn"
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Mixed bits: the checkpoint, if a quantizer has to be measured.",
            show_default="by the profile's name",
        ),
    ] = None
    skeleton_bits: Annotated[
        Literal["native", "8", "4"], typer.Option(help="Bits of the other matrices.")
    ] = "native"
    max_loss: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Limit of the predicted increase of perplexity by bits and lossy policies, e.g. "
            "2%.",
            show_default="1% for bits alone, misses are answered exactly",
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="The same limit as KL from the checkpoint, nats per token, e.g. 0.01. With a "
            "limit, cheaper forms of experts may answer misses.",
        ),
    ] = None
    robust: RobustOption = None
    context: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_CONTEXT, help="Tokens of prompt and text.")
    ] = 4096
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The plan.", show_default="profiles/NAME.plan.json"),
    ] = None
    profiles: ProfilesOption = DEFAULT_FOLDER
    offline: OfflineOption = False
