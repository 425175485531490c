"""`moe-tool eval-harness`: a bundle and tasks of lm-evaluation-harness in, their metrics out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import open_output
from moe_tool.cli.options import (
    BundleArgument,
    EvictionOption,
    GatesOption,
    JsonOption,
    LossyPrefillOption,
    OfflineOption,
    PolicyOption,
    ResidencyOption,
    RunMemoryOption,
    SeedOption,
    ThreadsOption,
)
from moe_tool.errors import UsageError

if TYPE_CHECKING:
    from moe_tool.evaluation.eval_harness import HarnessReport


def eval_harness(
    bundle: BundleArgument,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Tasks of lm_eval by name, or YAML files and folders by path (./mine.yaml).",
            show_default=False,
        ),
    ],
    include: Annotated[
        list[Path] | None,
        typer.Option(
            "--include",
            metavar="DIR",
            help="A folder with more tasks to name. May be repeated.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Documents per task.", show_default="all"),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            metavar="N",
            min=0,
            help="Solved examples before each question.",
            show_default="the task's",
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            metavar="N",
            min=2,
            help="Tokens of context and answer together; what is longer loses its beginning.",
        ),
    ] = 4096,
    decode_context: Annotated[
        bool,
        typer.Option(
            "--decode-context",
            help="Let the policy answer in the context too, from its second token on: otherwise "
            "the context is an exact prompt, and so is the first token that it predicts. Of "
            "log-likelihoods only.",
        ),
    ] = False,
    memory: RunMemoryOption = None,
    policy: PolicyOption = None,
    residency: ResidencyOption = None,
    eviction: EvictionOption = None,
    gates: GatesOption = True,
    lossy_prefill: LossyPrefillOption = False,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on a bundle."""
    with open_output(as_json=json) as output:
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        if not names:
            raise UsageError("--tasks names no task", hint="--tasks arc_easy,./mine.yaml")

        from moe_tool.evaluation.eval_harness import require_lm_eval, run_harness
        from moe_tool.evaluation.harness_tasks import HarnessOptions

        require_lm_eval()

        from moe_tool.reports.harness_table import harness_table
        from moe_tool.runtime.run_options import run_options

        report = run_harness(
            bundle,
            run_options(
                memory=memory,
                policy=policy,
                residency=residency,
                eviction=eviction,
                gates=gates,
                lossy_prompt=lossy_prefill,
                seed=seed,
                threads=threads,
                context=context,
            ),
            HarnessOptions(
                tasks=names,
                include=tuple(include or ()),
                limit=limit,
                num_fewshot=num_fewshot,
                decode_context=decode_context,
                offline=offline,
            ),
            progress=output.progress,
        )
        output.show(
            f"policy {report.policy}, {report.residency} residency", harness_table(report.rows)
        )
        output.say(_footer(report))
        if report.lossy and report.substitutions + report.lowered + report.drops == 0:
            output.say(_why_it_did_nothing(report))
        output.result(report.to_json())


def _footer(report: "HarnessReport") -> str:
    parts = [
        f"{report.prompt_tokens} + {report.decode_tokens} tokens",
        f"{report.seconds:.1f} s",
        f"hit rate {report.hit_rate:.1%}",
        f"{format_bytes(report.bytes_read_per_token)} read per token",
        f"stalled {report.stall_seconds:.2f} s",
        f"{report.substitutions} substitutions",
        f"peak memory {format_bytes(report.peak_rss_bytes)} "
        f"of {format_bytes(report.memory_budget_bytes)}",
    ]
    if report.lowered:
        parts.insert(-1, f"{report.lowered} by replicas")
    if report.drops:
        parts.insert(-1, f"{report.drops} drops")
    if report.cut_contexts:
        parts.insert(1, f"{report.cut_contexts} contexts lost their beginning")
    return " · ".join(parts)


def _why_it_did_nothing(report: "HarnessReport") -> str:
    if report.decode_tokens == 0:
        return (
            f"{report.policy} had nothing to answer: every answer is one token, which the exact "
            "context predicts; --decode-context lets the policy act in the context"
        )
    return f"{report.policy} changed no answer: these figures are those of exact"
