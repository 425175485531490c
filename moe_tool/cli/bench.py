"""`moe-tool bench`: measure a bundle's speed, as a table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.budget.request import parse_memory
from moe_tool.cli.console import Output
from moe_tool.cli.lookup import is_lookup_folder, require_rows_options
from moe_tool.cli.options import BundleArgument, GatesOption, SeedOption, ThrottleOption
from moe_tool.cli.verb import options_from, verb

if TYPE_CHECKING:
    from moe_tool.artifacts.bench_report import BenchReport, BenchRow
    from moe_tool.benchmarking.bench_plan import BenchOptions

Format = Literal["md", "csv", "json", "jsonl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchArguments:
    bundle: BundleArgument
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Rows ppN: a prompt of N tokens; 0: none.")
    ] = "512"
    generate: Annotated[
        str, typer.Option(metavar="N,...", help="Rows tgN: N tokens, one by one; 0: none.")
    ] = "64"
    depth: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens in context before the timing starts.")
    ] = "0"
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,...",
            help="Budgets of the whole process: 50%,min,4GiB,auto.",
            show_default="the plan's, or auto",
        ),
    ] = None
    policy: Annotated[
        str,
        typer.Option(metavar="NAME,...", help="Answers to missing experts, {miss policies}."),
    ] = "exact"
    eviction: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=N,...]",
            help="Eviction policy of the expert cache; repeat it for several.",
            show_default="the plan's, or lru",
        ),
    ] = None
    prefetch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Prefetch methods, as in `run`.",
            show_default="the plan's, or none",
        ),
    ] = None
    sparse_experts: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE,...",
            help="Shares of experts' channels to skip, as in `run`.",
            show_default=False,
        ),
    ] = None
    throttle: ThrottleOption = None
    gates: GatesOption = True
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Compute threads.",
            show_default="all cores; one less where torch computes",
        ),
    ] = None
    repetitions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Timed runs of each row.")
    ] = 3
    cache: Annotated[
        Literal["warm", "cold"],
        typer.Option(
            help="warm: after a run that is not counted. cold: expert cache and page cache of the "
            "bundle emptied before each run."
        ),
    ] = "warm"
    random: Annotated[
        bool, typer.Option("--random", help="Random token ids instead of built-in text.")
    ] = False
    seed: SeedOption = 0
    format: Annotated[Format, typer.Option(help="How the rows are printed on stdout.")] = "md"


@verb
def bench(given: BenchArguments, output: Output) -> None:
    """Measure tokens per second. Every combination of the lists is a row."""
    from moe_tool.benchmarking.bench_plan import (
        BenchOptions,
        parse_numbers,
        parse_policies,
        parse_words,
        refuse_too_long,
    )
    from moe_tool.policies.eviction import parse_eviction
    from moe_tool.policies.misses import parse_miss_policy
    from moe_tool.store.throttle import parse_throttle

    shares, threads = given.sparse_experts, given.threads
    options = options_from(
        given,
        BenchOptions,
        prompt_tokens=parse_numbers(given.prompt_tokens, int, option="--prompt-tokens"),
        generate=parse_numbers(given.generate, int, option="--generate"),
        depth=parse_numbers(given.depth, int, option="--depth"),
        memory=(None,)
        if given.memory is None
        else tuple(map(parse_memory, parse_words(given.memory, option="--memory"))),
        policy=tuple(map(parse_miss_policy, parse_policies(given.policy))),
        eviction=tuple(map(parse_eviction, given.eviction)) if given.eviction else (None,),
        prefetch=(None,)
        if given.prefetch is None
        else parse_words(given.prefetch, option="--prefetch"),
        sparse_experts=(None,)
        if shares is None
        else parse_numbers(shares, float, option="--sparse-experts"),
        throttle=None if given.throttle is None else parse_throttle(given.throttle),
        threads=(None,) if threads is None else parse_numbers(threads, int, option="--threads"),
    )
    if is_lookup_folder(given.bundle):
        require_rows_options(given)
    refuse_too_long(given.bundle, options)
    output.result(_measure(given, options, output))


def _measure(given: BenchArguments, options: "BenchOptions", output: Output) -> "BenchReport":
    """Print rows as they come (jsonl), or all of them at the end."""
    if is_lookup_folder(given.bundle):
        from moe_tool.benchmarking.bench_lookup import bench_lookup as measure
    else:
        from moe_tool.benchmarking.bench import bench as measure
    from moe_tool.reports.bench_formats import json_line

    rows: list[BenchRow] = []

    def take(row: "BenchRow") -> None:
        rows.append(row)
        if given.format == "jsonl":
            output.stream(json_line(row) + "\n")

    try:
        report = measure(given.bundle, options, on_row=take, progress=output.progress)
    finally:  # rows measured before an error or Ctrl-C are printed too
        if rows:
            _print(output, rows, given.format)
    output.say(
        f"{report.seconds:.1f} s, load average before {report.load_average:.2f}, "
        f"{'random tokens' if rows[0].tokens_from == 'random' else 'tokens of text'}"
    )
    return report


def _print(output: Output, rows: "list[BenchRow]", format: Format) -> None:  # noqa: A002
    from moe_tool.reports.bench_formats import csv_rows, json_rows, markdown_rows

    if output.as_json:
        output.say(markdown_rows(rows))
    elif format != "jsonl":
        formats = {"md": markdown_rows, "csv": csv_rows, "json": json_rows}
        output.stream(formats[format](rows) + "\n")
