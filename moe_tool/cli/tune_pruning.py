"""`moe-tool tune pruning`: train mask routers on text and add them to a bundle."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.budget.request import parse_memory_option
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.options import (
    BundleArgument,
    DataOption,
    OfflineOption,
    SeedOption,
    ThreadsOption,
    TrainMemoryOption,
)
from moe_tool.cli.verb import options_from, verb

if TYPE_CHECKING:
    from moe_tool.tuning.tune_pruning import TunePruningReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningArguments:
    bundle: BundleArgument
    data: DataOption
    rate: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Share of the chosen experts to drop. Other shares can be set when running: "
            "--policy prune:learned:rate=0.1.",
        ),
    ] = 0.2
    tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Tokens of text, all domains together; an eighth is held out."
        ),
    ] = 131072
    seq_len: Annotated[int, typer.Option(metavar="N", min=3, help="Tokens per sequence.")] = 256
    batch: Annotated[
        int, typer.Option(metavar="N", min=1, max=4096, help="Sequences per step.")
    ] = 8
    memory: TrainMemoryOption = None
    seed: SeedOption = 0
    threads: ThreadsOption = None
    offline: OfflineOption = False


@verb
def tune_pruning(given: TunePruningArguments, output: Output) -> None:
    """Train mask routers that drop the least useful experts, for `prune:learned`.

    A small router per layer is trained so that the pruned bundle predicts what the exact one does.
    Experts do not change; the routers are added to the bundle.
    """
    from moe_tool.text.sources import parse_sources, require_sources

    sources = parse_sources(given.data)
    require_sources(sources, offline=given.offline)

    from moe_tool.tuning.tune_pruning import TunePruningOptions
    from moe_tool.tuning.tune_pruning import tune_pruning as train

    report = train(
        given.bundle,
        sources,
        options_from(given, TunePruningOptions, memory=parse_memory_option(given.memory)),
        progress=output.progress,
    )
    output.show(_worth(report))
    output.say(
        f"wrote {given.bundle}/{report.file}: {report.steps} steps on {report.tokens} tokens, "
        f"{report.seconds:.0f} s, peak memory {format_bytes(report.peak_rss_bytes)} "
        f"of {format_bytes(report.memory_budget_bytes)}"
    )
    output.say(
        f'next: moe-tool run {given.bundle}/ --policy prune:learned --prompt "The list"; '
        f"moe-tool evaluate {given.bundle}/ --policy prune:learned --controls --data ..."
    )
    output.result(report)


def _worth(report: "TunePruningReport") -> str:
    kl = report.kl
    text = (
        f"{report.left_out:.1%} of the experts dropped on {report.held_out_tokens} held-out "
        f"tokens: KL {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}] per token; "
        f"{report.kl_by_ratio:.4f} by the ratio of gate weights at the same share"
    )
    text += f"\n{_kept(report)}"
    if kl.value >= report.kl_by_ratio:
        text += "\nno better than that rule: train on more --tokens, or use prune"
    layers = ", ".join(f"{layer}: {each:.0%}" for layer, each in report.left_out_by_layer.items())
    return f"{text}\nby layer: {layers}"


def _kept(report: "TunePruningReport") -> str:
    if not report.kept:
        return (
            "training did not help on other held-out text and was not kept: the routers are their "
            "start, the ratio of gate weights with one threshold for all layers"
        )
    way = "all" if report.kept == 1 else f"{report.kept:.1%}"
    return (
        f"{way} of what was learned is kept, chosen on other held-out text: "
        f"{report.kept_to_start:.2f} times the KL of the routers' start there"
    )
