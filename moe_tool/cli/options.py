"""Arguments shared by several commands, with the same name, unit, default and help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Residency = Literal["frozen", "cache"]
Activations = Literal["float32", "int8"]

MAX_CONTEXT = 2**31
"""Largest context that a plan can hold"""

JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, an alias (demo, mixtral, qwen3-moe, ...) or a hub id."
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="NAME",
        help="Branch, tag or commit on the hub; also MODEL@NAME.",
        show_default="main",
    ),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="FOLDER",
        help="Take the tokenizer and chat template from this folder.",
        show_default="the checkpoint's",
    ),
]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder that `pack` wrote.")
]
ProfilesOption = Annotated[
    Path, typer.Option(metavar="DIR", help="The folder of profiles and buddy maps.")
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use the local cache only, never the network.")
]
SeedOption = Annotated[
    int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="Seed of every random choice.")
]
_DATA = typer.Option(
    metavar="[NAME=]SOURCE",
    help="Text: builtin, a file or folder, wikitext, c4, or org/name[:config][:split]. Repeat "
    "it for several domains; NAME labels them.",
)
DataOption = Annotated[list[str], _DATA]
OptionalDataOption = Annotated[list[str] | None, _DATA]
_RUN_MEMORY = (
    "Budget of the whole process: 4GiB; 50% (of the experts, plus everything fixed); min; or auto "
    "(free memory less a margin)."
)
RunMemoryOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help=_RUN_MEMORY, show_default="the plan's, or auto")
]
TrainMemoryOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help=_RUN_MEMORY, show_default="auto")
]
ProfileMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="Budget of the whole process: 4GiB, or auto (80 % of free memory)."
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY=N,...]",
        help="Answer to experts that are not in memory, {miss policies}; all but exact change the "
        "text.",
        show_default="the calibrated or planned one, or exact",
    ),
]
ResidencyOption = Annotated[
    Residency | None,
    typer.Option(
        help="Experts in memory: a fixed set (frozen), or a cache.",
        show_default="cache for exact, frozen otherwise",
    ),
]
PrefetchOption = Annotated[
    str | None,
    typer.Option(
        help="Experts to read ahead: none; next-layer: those that the next layer's router chooses "
        "for this layer's input; stacked:depth=3: also of layers after it, while all experts of "
        "the nearer ones are in memory; partial:alpha=0.3: those that score clearly above the cut "
        "once this layer's experts in memory were computed, for which its shared experts and the "
        "next attention run once more. Exact text stays the same; a wrong guess costs bytes.",
        show_default="the plan's, or none",
    ),
]
EvictionOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY=N,...]",
        help="Eviction policy of the expert cache, {evictions}; `:per-layer` gives every layer a "
        "cache of its own. Exact text stays the same.",
        show_default="the plan's, or lru",
    ),
]
HardwareOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="A profile of `hardware`, or the name of a shipped one.",
        show_default="profiles/hardware.json",
    ),
]
GatesOption = Annotated[
    bool,
    typer.Option(
        "--gates/--no-gates",
        help="Whether a lossy policy answers sensitive tokens, and layers with too many misses, "
        "exactly.",
    ),
]
LossyPrefillOption = Annotated[
    bool,
    typer.Option(
        "--lossy-prefill",
        help="Apply the policy to the prompt too, which is exact otherwise; its errors stay in the "
        "KV cache.",
    ),
]
SparseExpertsOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of an expert's channels to skip while decoding, the least important ones for "
        "the token: 0 to 0.95, for bundles of `pack --sparse-experts`. Changes the text; prompts "
        "are computed in full.",
    ),
]
RowsOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|SIZE|none",
        help="Embedding tables that stay on disk, of which only the rows of the tokens at hand are "
        "read: those of SIZE or more; auto: of 64MiB or more, where memory has no room for "
        "everything. The text stays the same.",
        show_default="as `pack --rows`, or auto",
    ),
]
ThrottleOption = Annotated[
    str | None,
    typer.Option(
        metavar="SPEED[,LATENCY]",
        help="Slow reads of experts and of rows of tables down to a disk's speed, to measure what "
        "it would give: 200MB/s or 200MB/s,100us.",
        show_default=False,
    ),
]
ActivationsOption = Annotated[
    Activations,
    typer.Option(
        "--activations",
        help="Precision of tokens in products with a checkpoint's own codes: int8 is faster for "
        "mxfp4, nvfp4, int4 and int8, and changes the text.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=1024,
        help="Compute threads.",
        show_default="all cores; one less where torch computes",
    ),
]
RobustOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        min=0,
        max=1,
        help="How far residents are chosen for other text than the profile's: 0 by its mean use "
        "of experts, 1 by the worst case of its domains and of uniform use. What is predicted is "
        "for the profile.",
        show_default="the plan's, or what serves each domain best that is left out",
    ),
]
