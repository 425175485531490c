"""`moe-tool calibrate`: find the policy strength that keeps a KL limit on a bundle."""

from typing import Annotated

import typer

from moe_tool.budget.request import parse_memory_option
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import open_output
from moe_tool.cli.options import (
    BundleArgument,
    DataOption,
    JsonOption,
    OfflineOption,
    RunMemoryOption,
    SeedOption,
    ThreadsOption,
)

_MaxKl = Annotated[
    float,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        help="Limit of KL(exact || policy) per token, kept by the upper end of the 95 % interval.",
        show_default=False,
    ),
]
_Tokens = Annotated[
    int, typer.Option("--tokens", metavar="N", min=3, help="Tokens of text, all domains together.")
]
_SeqLen = Annotated[int, typer.Option("--seq-len", metavar="N", min=3, help="Tokens per sequence.")]


def calibrate(
    bundle: BundleArgument,
    data: DataOption,
    max_kl: _MaxKl,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            metavar="NAME[:KEY=N,...]",
            help="Policy to calibrate, {searched policies}.",
        ),
    ] = "priced",
    tokens: _Tokens = 8192,
    seq_len: _SeqLen = 256,
    memory: RunMemoryOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Find the strongest lossy policy within a KL limit. `run` uses it by default."""
    with open_output(as_json=json) as output:
        from moe_tool.policies.misses import parse_miss_policy
        from moe_tool.text.sources import parse_sources, require_sources

        choice, sources = parse_miss_policy(policy), parse_sources(data)
        require_sources(sources, offline=offline)

        from moe_tool.evaluation.calibrate import CalibrateOptions
        from moe_tool.evaluation.calibrate import calibrate as find
        from moe_tool.reports.evaluation_tables import evaluation_table

        report = find(
            bundle,
            sources,
            CalibrateOptions(
                max_kl=max_kl,
                policy=choice,
                tokens=tokens,
                seq_len=seq_len,
                memory=parse_memory_option(memory),
                seed=seed,
                threads=threads,
                offline=offline,
            ),
            progress=output.progress,
        )
        found = report.calibration
        output.show(
            "settings tried, the strongest first",
            evaluation_table({trial.policy.name: trial.figures for trial in report.trials}),
        )
        low, high = found.quality.kl_ci95
        output.say(
            f"{found.policy} keeps {found.max_kl:g}: KL {found.quality.kl:.4f} "
            f"[{low:.4f}, {high:.4f}], {format_bytes(report.bytes_read_per_token)} read per token; "
            f"written to {bundle}/, {report.seconds:.0f} s"
        )
        output.say(f'next: moe-tool run {bundle}/ --prompt "The list" uses it by default')
        output.result(report.to_json())
