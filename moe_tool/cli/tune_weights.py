"""`moe-tool tune weights`: train the codes of a bundle's experts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.budget.sizes import format_bytes, parse_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.options import BundleArgument, DataOption, OfflineOption, SeedOption
from moe_tool.cli.verb import options_from, verb

if TYPE_CHECKING:
    from moe_tool.artifacts.bundle_sections import TunedFloats
    from moe_tool.tuning.tune_bundle import TunedLayer
    from moe_tool.tuning.tune_weights import TuneReport

_FLOAT_RATE = 1e-3
"""The default of tuning/tune_options.py, which a test compares: help must not import torch"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneWeightsArguments:
    bundle: BundleArgument
    data: DataOption
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint that the bundle was packed from: a folder, an alias or a hub id.",
        ),
    ]
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The new bundle. An interrupted one is resumed.")
    ]
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, max=10**6, help="Updates per layer.")
    ] = 500
    batch: Annotated[
        int, typer.Option(metavar="N", min=1, max=2**20, help="Tokens per update.")
    ] = 1024
    tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=4, help="Tokens of text, all domains together; an eighth is held out."
        ),
    ] = 65536
    seq_len: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per sequence.")] = 512
    optimizer: Annotated[
        Literal["sgd", "adam"],
        typer.Option(help="sgd: with momentum, 4 bytes per weight of one layer; adam: 8."),
    ] = "sgd"
    rounding: Annotated[
        Literal["nearest", "stochastic"], typer.Option(help="Rounding of updated weights to codes.")
    ] = "nearest"
    feedback: Annotated[
        Literal["momentum", "none"],
        typer.Option(
            help="Where the rounding error of an update goes; none: it is lost, a control that "
            "changes almost nothing."
        ),
    ] = "momentum"
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=1e-9,
            max=1e6,
            help="Initial learning rate, in steps of a code; decays to a tenth.",
            show_default="0.1 for sgd, 0.01 for adam",
        ),
    ] = None
    norms: Annotated[
        bool,
        typer.Option(
            "--norms",
            help="Then train the norms too, as floats, by KL(checkpoint || bundle) of the whole "
            "model, in as many steps; kept only if held-out text says that it pays.",
        ),
    ] = False
    router: Annotated[
        bool,
        typer.Option(
            "--router",
            help="Likewise the routers: tokens choose other experts than in the checkpoint, which "
            "is counted.",
        ),
    ] = False
    float_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Initial learning rate of norms and routers, as a share of a tensor's root mean "
            "square; decays to a tenth.",
            show_default=f"{_FLOAT_RATE:g}",
        ),
    ] = None
    seed: SeedOption = 0
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Budget of the whole process, e.g. 4GiB.", show_default="no limit"
        ),
    ] = None
    offline: OfflineOption = False


@verb
def tune_weights(given: TuneWeightsArguments, output: Output) -> None:
    """Train the codes of low-bit experts to recover quality.

    One layer is in memory at a time, without a float copy of the weights: rounding errors go into
    the momentum (ECO). Writes a new bundle; the old one does not change. ECO trains norms and
    routers together with the codes, by the language model's loss; --norms and --router train them
    after the codes, by the divergence from the checkpoint, and keep what helps on held-out text.
    """
    from moe_tool.models.locate import locate_model
    from moe_tool.text.sources import parse_sources, require_sources

    sources = parse_sources(given.data)
    located = locate_model(given.model, offline=given.offline, announce=output.say)
    require_sources(sources, offline=given.offline)

    from moe_tool.tuning.tune_options import TuneOptions
    from moe_tool.tuning.tune_weights import tune_weights as tune

    memory_bytes = None if given.memory is None else parse_bytes(given.memory)
    report = tune(
        given.bundle,
        located,
        sources,
        options_from(given, TuneOptions, memory_bytes=memory_bytes),
        out=given.out,
        progress=output.progress,
    )
    _show(report, given.bundle, given.model, output)
    lineage = [step.model_dump(mode="json") for step in report.lineage]
    floats = None
    if report.floats is not None:
        floats = report.floats.model_dump(mode="json") | {"kept": report.floats.is_kept}
    output.result(asdict(report) | {"lineage": lineage, "floats": floats})


def _show(report: "TuneReport", bundle: Path, model: str, output: Output) -> None:
    for layer in report.layers:
        output.show(_layer(layer))
    if report.untuned:
        output.say(_untuned(report.untuned))
    if report.floats is not None:
        output.show(_floats(report.floats))
        if report.floats.router:
            output.say(_rerouted(report, model))
    if report.drops_calibration:
        output.say(f"{bundle}/ was calibrated; {report.bundle}/ is not, since its codes changed")
    output.say(
        f"wrote {report.bundle}/: {format_bytes(report.bytes)}; optimizer "
        f"{format_bytes(report.state_bytes)}, {report.state_bytes_per_weight} bytes per "
        f"weight of one layer; {report.seconds:.1f} s, "
        f"peak memory {format_bytes(report.peak_rss_bytes)}"
    )
    output.say(f"next: moe-tool evaluate {report.bundle}/ --reference {model} --data ...")


def _layer(layer: "TunedLayer") -> str:
    if not layer.is_kept:
        return f"layer {layer.layer}: error {layer.error_before:.4f} did not fall, codes unchanged"
    return (
        f"layer {layer.layer}: error {layer.error_before:.4f} -> {layer.error_after:.4f}, "
        f"{layer.moved:.1%} of the codes moved"
    )


def _floats(found: "TunedFloats") -> str:
    named = (("norms", found.norms), ("routers", found.router))
    trained = {name: share for name, share in named if share is not None}
    low, high = found.change_ci95
    measured = (
        f"KL(checkpoint || bundle) {found.codes_alone.kl:.4f} with codes alone, "
        f"{found.best.kl:.4f} with the best of them on {found.best.tokens} other held-out tokens, "
        f"change {low:+.4f} to {high:+.4f}"
    )
    if not found.is_kept:
        return f"{' and '.join(trained)}: nothing kept, since it does not pay: {measured}"
    kept = ", ".join(f"{share:.0%} of the training of {name}" for name, share in trained.items())
    return f"kept {kept}: {measured}"


def _rerouted(report: "TuneReport", model: str) -> str:
    assert report.floats is not None
    shares = [share for _, share in report.floats.rerouted]
    return (
        f"the routers changed: {sum(shares) / max(1, len(shares)):.1%} of the experts that "
        f"held-out tokens choose are others than with codes alone, {max(shares, default=0):.1%} in "
        f"the layer with the most. Exact is now what {report.bundle}/ says, and --reference "
        f"compares with {model}; hot experts, stand-ins and prices are still those of the "
        "checkpoint's routers"
    )


def _untuned(experts: Sequence[tuple[int, int]]) -> str:
    named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:4])
    more = f" and {len(experts) - 4} more" if len(experts) > 4 else ""
    return (
        f"unchanged, because the text routes few tokens or none to them: {named}{more}; "
        "more --tokens may help"
    )
