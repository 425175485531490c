"""`moe-tool profile`: record router traces and expert statistics of a model on text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER, profile_path
from moe_tool.budget.sizes import format_bytes, parse_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.options import (
    DataOption,
    ModelArgument,
    OfflineOption,
    ProfileMemoryOption,
    ProfilesOption,
    RevisionOption,
    SeedOption,
    TokenizerOption,
)
from moe_tool.cli.verb import verb


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileArguments:
    model: ModelArgument
    data: DataOption
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to trace, all domains together.")
    ] = 65536
    seq_len: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per sequence.")] = 512
    holdout: Annotated[
        float,
        typer.Option(
            metavar="SHARE", max=0.5, help="Share of the sequences to hold out for checks, above 0."
        ),
    ] = 0.25
    seed: SeedOption = 0
    memory: ProfileMemoryOption = "auto"
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted profile at its next layer.")
    ] = False
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The profile.", show_default="profiles/NAME.h5"),
    ] = None
    profiles: ProfilesOption = DEFAULT_FOLDER
    revision: RevisionOption = None
    tokenizer: TokenizerOption = None
    offline: OfflineOption = False


@verb
def profile(given: ProfileArguments, output: Output) -> None:
    """Record the routing of text and statistics of every expert.

    One decoder layer is in memory at a time.
    """
    from moe_tool.models.locate import locate_model
    from moe_tool.text.sources import parse_sources, require_sources

    memory_bytes = None if given.memory.strip().lower() == "auto" else parse_bytes(given.memory)
    sources = parse_sources(given.data)
    located = locate_model(
        given.model,
        revision=given.revision,
        tokenizer=given.tokenizer,
        offline=given.offline,
        announce=output.say,
    )
    require_sources(sources, offline=given.offline)

    from moe_tool.profiling.recorder import record_profile
    from moe_tool.reports.routing_tables import profile_tables

    report = record_profile(
        located,
        sources,
        out=given.out or profile_path(given.profiles, located.name),
        tokens=given.tokens,
        seq_len=given.seq_len,
        holdout=given.holdout,
        seed=given.seed,
        memory_bytes=memory_bytes,
        resume=given.resume,
        may_replace=given.out is not None,
        offline=given.offline,
        progress=output.progress,
    )
    output.show(*profile_tables(report.routing))
    output.say(
        f"wrote {report.profile}: {format_bytes(report.profile_bytes)}; "
        f"{report.tokens} tokens in {report.seconds:.1f} s "
        f"({report.tokens_per_second:.0f} tokens/s), "
        f"peak memory {format_bytes(report.peak_rss_bytes)} "
        f"of {format_bytes(report.memory_budget_bytes)}"
    )
    output.say(f"next: moe-tool buddies {report.profile} --k 2")
    output.result(report)
