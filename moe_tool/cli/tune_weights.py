"""`moe-tool tune weights`: train the codes of a bundle's experts."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.budget.sizes import format_bytes, parse_bytes
from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import BundleArgument, DataOption, JsonOption, OfflineOption, SeedOption

if TYPE_CHECKING:
    from moe_tool.tuning.tune_bundle import TunedLayer
    from moe_tool.tuning.tune_weights import TuneReport


_ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The checkpoint that the bundle was packed from: a folder, an alias or a hub id.",
        show_default=False,
    ),
]
_OutOption = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The new bundle. An interrupted one is resumed.",
        show_default=False,
    ),
]
_StepsOption = Annotated[
    int, typer.Option("--steps", metavar="N", min=1, max=10**6, help="Updates per layer.")
]
_BatchOption = Annotated[
    int,
    typer.Option("--batch", metavar="N", min=1, max=2**20, help="Tokens per update."),
]
_TokensOption = Annotated[
    int,
    typer.Option(
        "--tokens",
        metavar="N",
        min=4,
        help="Tokens of text, all domains together; an eighth is held out.",
    ),
]
_SeqLenOption = Annotated[
    int, typer.Option("--seq-len", metavar="N", min=2, help="Tokens per sequence.")
]
_OptimizerOption = Annotated[
    Literal["sgd", "adam"],
    typer.Option(
        "--optimizer",
        help="sgd: with momentum, 4 bytes per weight of one layer; adam: 8.",
    ),
]
_RoundingOption = Annotated[
    Literal["nearest", "stochastic"],
    typer.Option("--rounding", help="Rounding of updated weights to codes."),
]
_FeedbackOption = Annotated[
    Literal["momentum", "none"],
    typer.Option(
        "--feedback",
        help="Where the rounding error of an update goes; none: it is lost, a control that "
        "changes almost nothing.",
    ),
]
_RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate",
        metavar="X",
        min=1e-9,
        max=1e6,
        help="Initial learning rate, in steps of a code; decays to a tenth.",
        show_default="0.1 for sgd, 0.01 for adam",
    ),
]
_MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Budget of the whole process, e.g. 4GiB.",
        show_default="no limit",
    ),
]


def tune_weights(
    bundle: BundleArgument,
    data: DataOption,
    model: _ModelOption,
    out: _OutOption,
    steps: _StepsOption = 500,
    batch: _BatchOption = 1024,
    tokens: _TokensOption = 65536,
    seq_len: _SeqLenOption = 512,
    optimizer: _OptimizerOption = "sgd",
    rounding: _RoundingOption = "nearest",
    feedback: _FeedbackOption = "momentum",
    rate: _RateOption = None,
    seed: SeedOption = 0,
    memory: _MemoryOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Train the codes of low-bit experts to recover quality.

    One layer is in memory at a time, without a float copy of the weights: rounding errors go into
    the momentum (ECO). Writes a new bundle; the old one does not change.
    """
    with open_output(as_json=json) as output:
        from moe_tool.models.locate import locate_model
        from moe_tool.text.sources import parse_sources, require_sources

        sources = parse_sources(data)
        located = locate_model(model, offline=offline, announce=output.say)
        require_sources(sources, offline=offline)

        from moe_tool.tuning.tune_options import TuneOptions
        from moe_tool.tuning.tune_weights import tune_weights as tune

        report = tune(
            bundle,
            located,
            sources,
            TuneOptions(
                steps=steps,
                batch=batch,
                tokens=tokens,
                seq_len=seq_len,
                optimizer=optimizer,
                rounding=rounding,
                feedback=feedback,
                rate=rate,
                seed=seed,
                memory_bytes=None if memory is None else parse_bytes(memory),
                offline=offline,
            ),
            out=out,
            progress=output.progress,
        )
        _show(report, bundle, model, output)
        lineage = [step.model_dump(mode="json") for step in report.lineage]
        output.result(asdict(report) | {"lineage": lineage})


def _show(report: "TuneReport", bundle: Path, model: str, output: Output) -> None:
    for layer in report.layers:
        output.show(_layer(layer))
    if report.untuned:
        output.say(_untuned(report.untuned))
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


def _untuned(experts: Sequence[tuple[int, int]]) -> str:
    named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:4])
    more = f" and {len(experts) - 4} more" if len(experts) > 4 else ""
    return (
        f"unchanged, because the text routes few tokens or none to them: {named}{more}; "
        "more --tokens may help"
    )
