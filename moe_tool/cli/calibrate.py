"""`moe-tool calibrate`: find the policy strength that keeps a KL limit on a bundle."""

from dataclasses import dataclass
from typing import Annotated

import typer

from moe_tool.budget.request import parse_memory_option
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.options import (
    BundleArgument,
    DataOption,
    OfflineOption,
    RunMemoryOption,
    SeedOption,
    ThreadsOption,
)
from moe_tool.cli.verb import verb


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateArguments:
    bundle: BundleArgument
    data: DataOption
    max_kl: Annotated[
        float,
        typer.Option(
            metavar="NATS",
            help="Limit of KL(exact || policy) per token, kept by the upper end of the 95 % "
            "interval.",
            show_default=False,
        ),
    ]
    policy: Annotated[
        str,
        typer.Option(metavar="NAME[:KEY=N,...]", help="Policy to calibrate, {searched policies}."),
    ] = "priced"
    tokens: Annotated[
        int, typer.Option(metavar="N", min=3, help="Tokens of text, all domains together.")
    ] = 8192
    seq_len: Annotated[int, typer.Option(metavar="N", min=3, help="Tokens per sequence.")] = 256
    memory: RunMemoryOption = None
    seed: SeedOption = 0
    threads: ThreadsOption = None
    offline: OfflineOption = False


@verb
def calibrate(given: CalibrateArguments, output: Output) -> None:
    """Find the strongest lossy policy within a KL limit. `run` uses it by default."""
    from moe_tool.policies.misses import parse_miss_policy
    from moe_tool.text.sources import parse_sources, require_sources

    choice, sources = parse_miss_policy(given.policy), parse_sources(given.data)
    require_sources(sources, offline=given.offline)

    from moe_tool.evaluation.calibrate import calibrate as find
    from moe_tool.evaluation.evaluate import EvaluateOptions
    from moe_tool.reports.evaluation_tables import evaluation_table

    options = EvaluateOptions(
        tokens=given.tokens,
        seq_len=given.seq_len,
        memory=parse_memory_option(given.memory),
        policy=choice,
        seed=given.seed,
        threads=given.threads,
        offline=given.offline,
    )
    report = find(given.bundle, sources, options, max_kl=given.max_kl, progress=output.progress)
    found = report.calibration
    output.show(
        "settings tried, the strongest first",
        evaluation_table({trial.policy.name: trial.figures for trial in report.trials}),
    )
    low, high = found.quality.kl_ci95
    output.say(
        f"{found.policy} keeps {found.max_kl:g} on {found.domain_names}: KL {found.quality.kl:.4f} "
        f"[{low:.4f}, {high:.4f}], {format_bytes(report.bytes_read_per_token)} read per token; "
        f"written to {given.bundle}/, {report.seconds:.0f} s; "
        "text of other kinds is judged as it runs"
    )
    output.say(f'next: moe-tool run {given.bundle}/ --prompt "The list" uses it by default')
    output.result(report.to_json())
