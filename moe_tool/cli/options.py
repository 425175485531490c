"""The arguments that several verbs share, each with one name, unit, default and sentence."""

from pathlib import Path
from typing import Annotated, Literal

import typer

PrefetchName = Literal["none", "next-layer"]
Residency = Literal["frozen", "cache"]

MAX_CONTEXT = 2**31
"""Largest context that a plan can hold"""

JsonOption = Annotated[
    bool,
    typer.Option("--json", help="One JSON object on stdout, everything else on stderr."),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, an alias (demo, mixtral, qwen3-moe, ...) or a hub id.",
        show_default=False,
    ),
]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder that `pack` wrote.", show_default=False)
]
ProfilesOption = Annotated[
    Path,
    typer.Option("--profiles", metavar="DIR", help="The folder of profiles and buddy maps."),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Take from the local cache or fail; never the network.")
]
SeedOption = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Seed of every random choice."),
]
DataOption = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="[NAME=]SOURCE",
        help="Text: builtin, a file or folder, wikitext, c4, or org/name[:config][:split]. "
        "Repeat it for several domains; NAME labels them.",
        show_default=False,
    ),
]
_RUN_MEMORY = (
    "Budget of the whole process: 4GiB; 50% of the experts beside everything fixed; min; or auto, "
    "what is free less a margin."
)
RunMemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help=_RUN_MEMORY, show_default="the plan's, or auto"),
]
TrainMemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help=_RUN_MEMORY, show_default="auto"),
]
ProfileMemoryOption = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Budget of the whole process: 4GiB, or auto, 80 % of what is free.",
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME[:KEY=N,...]",
        help="What answers an expert that is not in memory; all but exact change the text; "
        "{miss policies}.",
        show_default="what the bundle was calibrated for, or exact",
    ),
]
ResidencyOption = Annotated[
    Residency | None,
    typer.Option(
        "--residency",
        help="What a lossy policy finds in memory: a fixed set of experts, or a cache.",
        show_default="cache for exact, frozen otherwise",
    ),
]
PrefetchOption = Annotated[
    PrefetchName | None,
    typer.Option(
        "--prefetch",
        help="What is read before it is wanted: nothing, or what the next layer's router makes of "
        "this layer's input. The text stays the same; a wrong guess costs bytes.",
        show_default="the plan's, or none",
    ),
]
EvictionOption = Annotated[
    str | None,
    typer.Option(
        "--eviction",
        metavar="NAME[:KEY=N,...]",
        help="What leaves the expert cache first, {evictions}; `:per-layer` gives every layer its "
        "own part. The text stays the same.",
        show_default="the plan's, or lru",
    ),
]
HardwareOption = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="FILE|NAME",
        help="A profile of `hardware`, or the name of a shipped one.",
        show_default="profiles/hardware.json",
    ),
]
GatesOption = Annotated[
    bool,
    typer.Option(
        "--gates/--no-gates",
        help="Whether a lossy policy leaves sensitive tokens and too many misses to exact reads.",
    ),
]
LossyPrefillOption = Annotated[
    bool,
    typer.Option(
        "--lossy-prefill",
        help="Let the policy answer the prompt too, which is exact otherwise: what that leaves in "
        "the KV cache stays wrong.",
    ),
]
SparseExpertsOption = Annotated[
    float | None,
    typer.Option(
        "--sparse-experts",
        metavar="SHARE",
        help="Leave this share of an expert's channels out while decoding, those that matter "
        "least to the token: 0 to 0.95, for bundles of `pack --sparse-experts`. Changes the text; "
        "prompts are computed in full.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=1024,
        help="Threads of computation.",
        show_default="all cores; one less where torch computes",
    ),
]
