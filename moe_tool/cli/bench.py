"""`moe-tool bench`: how fast a bundle runs, as a table."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import BundleArgument, GatesOption, JsonOption, SeedOption
from moe_tool.errors import MoeToolError

if TYPE_CHECKING:
    from moe_tool.benchmarking.bench import BenchRow
    from moe_tool.benchmarking.bench_plan import BenchOptions

_MAX_CONFIG_BYTES = 4 * 2**20
Format = Literal["md", "csv", "json", "jsonl"]


def bench(
    bundle: BundleArgument,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            "--prompt-tokens", metavar="N,...", help="Rows ppN: a prompt of N tokens; 0: none."
        ),
    ] = "512",
    generate: Annotated[
        str,
        typer.Option(
            "--generate", metavar="N,...", help="Rows tgN: N tokens, one by one; 0: none."
        ),
    ] = "64",
    depth: Annotated[
        str,
        typer.Option(
            "--depth", metavar="N,...", help="Tokens that are in context before the clock starts."
        ),
    ] = "0",
    memory: Annotated[
        str,
        typer.Option(
            "--memory", metavar="SIZE,...", help="Budgets of the whole process: 50%,min,4GiB,auto."
        ),
    ] = "auto",
    policy: Annotated[
        str,
        typer.Option("--policy", metavar="NAME,...", help="As run takes them."),
    ] = "exact",
    eviction: Annotated[
        list[str] | None,
        typer.Option(
            "--eviction",
            metavar="NAME[:KEY=N,...]",
            help="Who leaves the expert cache; repeat it for several.",
            show_default="lru",
        ),
    ] = None,
    prefetch: Annotated[
        str, typer.Option("--prefetch", metavar="NAME,...", help="none, next-layer.")
    ] = "none",
    sparse_experts: Annotated[
        str | None,
        typer.Option(
            "--sparse-experts",
            metavar="SHARE,...",
            help="Shares of experts' channels to leave out, as run takes them.",
            show_default=False,
        ),
    ] = None,
    gates: GatesOption = True,
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads",
            metavar="N,...",
            help="Threads of computation.",
            show_default="all cores; one less where torch computes",
        ),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", metavar="N", min=1, help="Timed runs of each row.")
    ] = 3,
    cache: Annotated[
        Literal["warm", "cold"],
        typer.Option(
            "--cache",
            help="warm: after a run that is not counted. cold: expert cache and page cache of the "
            "bundle emptied before each run.",
        ),
    ] = "warm",
    random: Annotated[
        bool, typer.Option("--random", help="Random token ids instead of built-in text.")
    ] = False,
    seed: SeedOption = 0,
    format: Annotated[  # noqa: A002
        Format, typer.Option("--format", help="How the rows are printed on stdout.")
    ] = "md",
    json: JsonOption = False,
) -> None:
    """Measure tokens per second. Lists by comma are crossed: a row for every combination."""
    with open_output(as_json=json) as output:
        from moe_tool.benchmarking.bench_plan import (
            BenchOptions,
            parse_numbers,
            parse_shares,
            parse_words,
        )

        options = BenchOptions(
            prompt_tokens=parse_numbers(prompt_tokens, option="--prompt-tokens"),
            generate=parse_numbers(generate, option="--generate"),
            depth=parse_numbers(depth, option="--depth"),
            memory=parse_words(memory, option="--memory"),
            policy=parse_words(policy, option="--policy"),
            eviction=tuple(eviction or ["lru"]),
            prefetch=parse_words(prefetch, option="--prefetch"),
            sparse_experts=(None,)
            if sparse_experts is None
            else parse_shares(sparse_experts, option="--sparse-experts"),
            threads=(None,) if threads is None else parse_numbers(threads, option="--threads"),
            repetitions=repetitions,
            cache=cache,
            gates=gates,
            random=random,
            seed=seed,
        )

        _refuse_too_long(bundle, options)

        from moe_tool.benchmarking.bench import bench as measure
        from moe_tool.reports.bench_formats import json_line

        rows: list[BenchRow] = []

        def take(row: "BenchRow") -> None:
            rows.append(row)
            if format == "jsonl":
                output.stream(json_line(asdict(row)) + "\n")

        try:
            report = measure(bundle, options, on_row=take, progress=output.progress)
        finally:  # what was measured before an error or Ctrl-C is not lost
            if rows:
                _print(output, rows, format)
        output.say(
            f"{report.seconds:.1f} s, load average before {report.load_average:.2f}, "
            f"{'random tokens' if rows[0].tokens_from == 'random' else 'tokens of text'}"
        )
        output.result(report.to_json())


def _refuse_too_long(bundle: Path, options: "BenchOptions") -> None:
    """Refuse tests beyond the model's context before torch is loaded, which takes seconds.

    A bundle that is missing or damaged is left to the run, which says what is wrong with it.

    Raises:
        UsageError: a test goes beyond the context, or options that mean nothing.
    """
    from moe_tool.benchmarking.bench_plan import list_tests
    from moe_tool.formats.hostile_file import read_capped
    from moe_tool.formats.strict_json import parse_json_object
    from moe_tool.models.context_length import context_length

    path = bundle / "config.json"
    try:
        text = read_capped(path, limit_bytes=_MAX_CONFIG_BYTES, remedy="")
        limit = context_length(parse_json_object(path, text, remedy=""))
    except MoeToolError:
        return
    list_tests(options, context_limit=limit)


def _print(output: Output, rows: "list[BenchRow]", format: Format) -> None:  # noqa: A002
    from moe_tool.reports.bench_formats import csv_rows, json_rows, markdown_rows

    fields = [asdict(row) for row in rows]
    if output.as_json:
        output.say(markdown_rows(fields))
    elif format != "jsonl":
        formats = {"md": markdown_rows, "csv": csv_rows, "json": json_rows}
        output.stream(formats[format](fields) + "\n")
