"""`moe-tool profile`: record router traces and expert statistics of a model on text."""

from pathlib import Path
from typing import Annotated

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER, profile_path
from moe_tool.budget.sizes import format_bytes, parse_bytes
from moe_tool.cli.console import open_output
from moe_tool.cli.options import (
    DataOption,
    JsonOption,
    ModelArgument,
    OfflineOption,
    ProfileMemoryOption,
    ProfilesOption,
    RevisionOption,
    SeedOption,
    TokenizerOption,
)

_Tokens = Annotated[
    int, typer.Option("--tokens", metavar="N", min=1, help="Tokens to trace, all domains together.")
]
_SeqLen = Annotated[int, typer.Option("--seq-len", metavar="N", min=2, help="Tokens per sequence.")]
_Holdout = Annotated[
    float,
    typer.Option(
        "--holdout",
        metavar="SHARE",
        min=0,
        max=0.9,
        help="Share of the sequences to hold out for checks.",
    ),
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted profile at its next layer.")
]
_Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="The profile.", show_default="profiles/NAME.h5"),
]


def profile(
    model: ModelArgument,
    data: DataOption,
    tokens: _Tokens = 65536,
    seq_len: _SeqLen = 512,
    holdout: _Holdout = 0.25,
    seed: SeedOption = 0,
    memory: ProfileMemoryOption = "auto",
    resume: _Resume = False,
    out: _Out = None,
    profiles: ProfilesOption = DEFAULT_FOLDER,
    revision: RevisionOption = None,
    tokenizer: TokenizerOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Record the routing of text and statistics of every expert.

    One decoder layer is in memory at a time.
    """
    with open_output(as_json=json) as output:
        from moe_tool.models.locate import locate_model
        from moe_tool.text.sources import parse_sources, require_sources

        memory_bytes = None if memory.strip().lower() == "auto" else parse_bytes(memory)
        sources = parse_sources(data)
        located = locate_model(
            model, revision=revision, tokenizer=tokenizer, offline=offline, announce=output.say
        )
        require_sources(sources, offline=offline)

        from moe_tool.profiling.recorder import record_profile
        from moe_tool.reports.routing_tables import profile_tables

        report = record_profile(
            located,
            sources,
            out=out or profile_path(profiles, located.name),
            tokens=tokens,
            seq_len=seq_len,
            holdout=holdout,
            seed=seed,
            memory_bytes=memory_bytes,
            resume=resume,
            may_replace=out is not None,
            offline=offline,
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
