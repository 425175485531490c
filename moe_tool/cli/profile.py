"""`moe-tool profile`: record router traces and expert statistics of a model on text."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER, profile_path
from moe_tool.budget.sizes import format_bytes, parse_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.options import (
    ModelArgument,
    OfflineOption,
    OptionalDataOption,
    ProfileMemoryOption,
    ProfilesOption,
    RevisionOption,
    SeedOption,
    TokenizerOption,
)
from moe_tool.cli.verb import verb
from moe_tool.errors import UsageError

if TYPE_CHECKING:
    from moe_tool.models.locate import LocatedModel
    from moe_tool.profiling.recorder import ProfileReport
    from moe_tool.text.sources import TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileArguments:
    model: ModelArgument
    data: OptionalDataOption = None
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE",
            help="Add this text to the profile at --out, with its sequence length, share and seed; "
            "instead of --data.",
        ),
    ] = None
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

    _check_given(given)
    sources = parse_sources(given.data or given.add or [])
    located = locate_model(
        given.model,
        revision=given.revision,
        tokenizer=given.tokenizer,
        offline=given.offline,
        announce=output.say,
    )
    require_sources(sources, offline=given.offline)
    report = _record(given, located, sources, output)

    from moe_tool.reports.routing_tables import profile_tables

    output.show(*profile_tables(report.routing))
    output.say(
        f"wrote {report.profile}: {format_bytes(report.profile_bytes)}; "
        f"{report.added.tokens if report.added else report.tokens} tokens "
        f"in {report.seconds:.1f} s "
        f"({report.tokens_per_second:.0f} tokens/s), "
        f"peak memory {format_bytes(report.peak_rss_bytes)} "
        f"of {format_bytes(report.memory_budget_bytes)}"
    )
    if report.added is not None:
        output.say(
            f"added {report.added.tokens} tokens of {', '.join(report.added.domains)}; "
            f"the profile's domains: {', '.join(report.domains)}"
        )
    output.say(f"next: moe-tool buddies {report.profile} --k 2")
    output.result(report)


def _check_given(given: ProfileArguments) -> None:
    """Refuse options that contradict each other."""
    if bool(given.data) == bool(given.add):
        raise UsageError(
            "give either --data or --add" if given.data else "no text source is given",
            hint="--data records a new profile, --add widens the one at --out",
        )
    changed = [
        field.name
        for field in fields(given)
        if field.name in ("seq_len", "holdout", "seed")
        and getattr(given, field.name) != field.default
    ]
    if given.add and changed:
        raise UsageError(
            f"--{changed[0].replace('_', '-')} cannot be changed by --add",
            hint="leave it out: the profile's own is used",
        )


def _record(
    given: ProfileArguments,
    located: "LocatedModel",
    sources: "tuple[TextSource, ...]",
    output: Output,
) -> "ProfileReport":
    from moe_tool.profiling.profile_addition import add_to_profile
    from moe_tool.profiling.recorder import record_profile

    out = given.out or profile_path(given.profiles, located.name)
    memory_bytes = None if given.memory.strip().lower() == "auto" else parse_bytes(given.memory)
    if given.add:
        return add_to_profile(
            located,
            sources,
            out=out,
            tokens=given.tokens,
            memory_bytes=memory_bytes,
            resume=given.resume,
            offline=given.offline,
            progress=output.progress,
        )
    return record_profile(
        located,
        sources,
        out=out,
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
