"""Options of `moe-tool plan`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_tool.cli.options import MAX_CONTEXT

BitsChoice = Literal["auto", "native", "8", "4", "mixed"]
ProfileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="PROFILE", help="A profile.", show_default="newest in profiles/"),
]
BudgetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Budget of the whole process: 8GiB, or 50% (of the experts, plus everything fixed); "
        "repeat it to compare budgets.",
        show_default=False,
    ),
]
DiskOption = Annotated[
    str | None,
    typer.Option(
        "--disk",
        metavar="RATE",
        help="Disk rate per second, e.g. 3GB, instead of the machine's.",
        show_default=False,
    ),
]
PlanBitsOption = Annotated[
    BitsChoice,
    typer.Option(
        "--bits",
        help="Bits of the experts; auto: the fastest within --max-loss; mixed: bits per expert, "
        "with the least expected loss that fits into --memory, or the fewest bytes within "
        "--max-kl.",
    ),
]
AverageBitsOption = Annotated[
    float | None,
    typer.Option(
        "--average-bits",
        metavar="BITS",
        help="Mixed bits: average bits per expert weight, e.g. 2.5.",
        show_default=False,
    ),
]
QuantizerOption = Annotated[
    str,
    typer.Option(
        "--quantizer",
        metavar="NAME",
        help="Mixed bits: quantizer that `pack` will use, {quantizers}. Errors of rtn are in the "
        "profile; those of another one are measured in a pass over the model and kept.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Mixed bits: the checkpoint, if a quantizer has to be measured.",
        show_default="by the profile's name",
    ),
]
SkeletonBitsOption = Annotated[
    Literal["native", "8", "4"],
    typer.Option("--skeleton-bits", help="Bits of the other matrices."),
]
MaxLossOption = Annotated[
    str | None,
    typer.Option(
        "--max-loss",
        metavar="SHARE",
        help="Limit of the predicted increase of perplexity by bits and lossy policies, e.g. 2%.",
        show_default="1% for bits alone, misses are answered exactly",
    ),
]
MaxKlOption = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        help="The same limit as KL from the checkpoint, nats per token, e.g. 0.01. With a limit, "
        "cheaper forms of experts may answer misses.",
        show_default=False,
    ),
]
ContextOption = Annotated[
    int,
    typer.Option(
        "--context", metavar="N", min=1, max=MAX_CONTEXT, help="Tokens of prompt and text."
    ),
]
PlanFileOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="The plan.", show_default="profiles/NAME.plan.json"),
]
