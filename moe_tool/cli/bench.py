"""`moe-tool bench`: measure a bundle's speed, as a table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.budget.request import parse_memory
from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import BundleArgument, GatesOption, JsonOption, SeedOption

if TYPE_CHECKING:
    from moe_tool.artifacts.bench_report import BenchReport, BenchRow
    from moe_tool.benchmarking.bench_plan import BenchOptions

Format = Literal["md", "csv", "json", "jsonl"]


_PromptTokens = Annotated[
    str,
    typer.Option(
        "--prompt-tokens", metavar="N,...", help="Rows ppN: a prompt of N tokens; 0: none."
    ),
]
_Generate = Annotated[
    str,
    typer.Option("--generate", metavar="N,...", help="Rows tgN: N tokens, one by one; 0: none."),
]
_Depth = Annotated[
    str,
    typer.Option("--depth", metavar="N,...", help="Tokens in context before the timing starts."),
]
_Memory = Annotated[
    str,
    typer.Option(
        "--memory", metavar="SIZE,...", help="Budgets of the whole process: 50%,min,4GiB,auto."
    ),
]
_Policy = Annotated[
    str,
    typer.Option("--policy", metavar="NAME,...", help="Miss policies, as in `run`."),
]
_Eviction = Annotated[
    list[str] | None,
    typer.Option(
        "--eviction",
        metavar="NAME[:KEY=N,...]",
        help="Eviction policy of the expert cache; repeat it for several.",
        show_default="lru",
    ),
]
_Prefetch = Annotated[
    str, typer.Option("--prefetch", metavar="NAME,...", help="Prefetch methods: none, next-layer.")
]
_SparseExperts = Annotated[
    str | None,
    typer.Option(
        "--sparse-experts",
        metavar="SHARE,...",
        help="Shares of experts' channels to skip, as in `run`.",
        show_default=False,
    ),
]
_Threads = Annotated[
    str | None,
    typer.Option(
        "--threads",
        metavar="N,...",
        help="Compute threads.",
        show_default="all cores; one less where torch computes",
    ),
]
_Repetitions = Annotated[
    int, typer.Option("--repetitions", metavar="N", min=1, help="Timed runs of each row.")
]
_Cache = Annotated[
    Literal["warm", "cold"],
    typer.Option(
        "--cache",
        help="warm: after a run that is not counted. cold: expert cache and page cache of the "
        "bundle emptied before each run.",
    ),
]
_Random = Annotated[
    bool, typer.Option("--random", help="Random token ids instead of built-in text.")
]
_Format = Annotated[Format, typer.Option("--format", help="How the rows are printed on stdout.")]


def bench(
    bundle: BundleArgument,
    prompt_tokens: _PromptTokens = "512",
    generate: _Generate = "64",
    depth: _Depth = "0",
    memory: _Memory = "auto",
    policy: _Policy = "exact",
    eviction: _Eviction = None,
    prefetch: _Prefetch = "none",
    sparse_experts: _SparseExperts = None,
    gates: GatesOption = True,
    threads: _Threads = None,
    repetitions: _Repetitions = 3,
    cache: _Cache = "warm",
    random: _Random = False,
    seed: SeedOption = 0,
    format: _Format = "md",  # noqa: A002
    json: JsonOption = False,
) -> None:
    """Measure tokens per second. Every combination of the lists is a row."""
    with open_output(as_json=json) as output:
        from moe_tool.benchmarking.bench_plan import (
            BenchOptions,
            parse_numbers,
            parse_shares,
            parse_words,
            refuse_too_long,
        )
        from moe_tool.policies.eviction import parse_eviction
        from moe_tool.policies.misses import parse_miss_policy

        options = BenchOptions(
            prompt_tokens=parse_numbers(prompt_tokens, option="--prompt-tokens"),
            generate=parse_numbers(generate, option="--generate"),
            depth=parse_numbers(depth, option="--depth"),
            memory=tuple(map(parse_memory, parse_words(memory, option="--memory"))),
            policy=tuple(map(parse_miss_policy, parse_words(policy, option="--policy"))),
            eviction=tuple(map(parse_eviction, eviction or ["lru"])),
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

        refuse_too_long(bundle, options)
        output.result(_measure(bundle, options, format, output))


def _measure(
    bundle: Path,
    options: "BenchOptions",
    format: Format,  # noqa: A002
    output: Output,
) -> "BenchReport":
    """Print rows as they come (jsonl), or all of them at the end."""
    from moe_tool.benchmarking.bench import bench as measure
    from moe_tool.reports.bench_formats import json_line

    rows: list[BenchRow] = []

    def take(row: "BenchRow") -> None:
        rows.append(row)
        if format == "jsonl":
            output.stream(json_line(row) + "\n")

    try:
        report = measure(bundle, options, on_row=take, progress=output.progress)
    finally:  # rows measured before an error or Ctrl-C are printed too
        if rows:
            _print(output, rows, format)
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
