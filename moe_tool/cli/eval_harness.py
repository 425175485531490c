"""`moe-tool eval-harness`: run tasks of lm-evaluation-harness on a bundle."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.cli.console import Output
from moe_tool.cli.options import (
    BundleArgument,
    EvictionOption,
    GatesOption,
    LossyPrefillOption,
    OfflineOption,
    PolicyOption,
    ResidencyOption,
    RunMemoryOption,
    SeedOption,
    ThreadsOption,
)
from moe_tool.cli.verb import options_from, verb
from moe_tool.errors import UsageError

if TYPE_CHECKING:
    from moe_tool.artifacts.evaluation_report import HarnessReport


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalHarnessArguments:
    bundle: BundleArgument
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Tasks of lm_eval by name, or YAML files and folders by path (./mine.yaml).",
        ),
    ]
    include: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder with more tasks to name. May be repeated."),
    ] = None
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Documents per task.", show_default="all")
    ] = None
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Solved examples before each question.",
            show_default="the task's",
        ),
    ] = None
    context: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=2,
            help="Tokens of context and answer together; longer contexts are cut at the beginning.",
        ),
    ] = 4096
    decode_context: Annotated[
        bool,
        typer.Option(
            "--decode-context",
            help="In log-likelihoods, apply the policy to the context too, from its second token "
            "on. Otherwise the context is an exact prompt, and the first answer token is exact "
            "too.",
        ),
    ] = False
    memory: RunMemoryOption = None
    policy: PolicyOption = None
    residency: ResidencyOption = None
    eviction: EvictionOption = None
    gates: GatesOption = True
    lossy_prefill: LossyPrefillOption = False
    seed: SeedOption = 0
    threads: ThreadsOption = None
    offline: OfflineOption = False


@verb
def eval_harness(given: EvalHarnessArguments, output: Output) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on a bundle."""
    names = tuple(name.strip() for name in given.tasks.split(",") if name.strip())
    if not names:
        raise UsageError("--tasks names no task", hint="--tasks arc_easy,./mine.yaml")

    from moe_tool.evaluation.eval_harness import require_lm_eval, run_harness
    from moe_tool.evaluation.harness_tasks import HarnessOptions

    require_lm_eval()

    from moe_tool.runtime.run_options import run_options

    run = run_options(
        memory=given.memory,
        policy=given.policy,
        residency=given.residency,
        eviction=given.eviction,
        gates=given.gates,
        lossy_prompt=given.lossy_prefill,
        seed=given.seed,
        threads=given.threads,
        context=given.context,
    )
    include = tuple(given.include or ())
    options = options_from(given, HarnessOptions, tasks=names, include=include)
    report = run_harness(given.bundle, run, options, progress=output.progress)
    _show(report, output)
    output.result(report)


def _show(report: "HarnessReport", output: Output) -> None:
    from moe_tool.reports.evaluation_tables import harness_table
    from moe_tool.reports.run_lines import harness_line

    setup = report.setup
    output.show(f"policy {setup.policy}, {setup.residency} residency", harness_table(report))
    output.say(harness_line(report))
    if report.lossy and not report.decode.changed_answers:
        output.say(_unchanged(report))


def _unchanged(report: "HarnessReport") -> str:
    policy = report.setup.policy
    if report.decode.tokens == 0:
        return (
            f"{policy} was never used: every answer is one token, predicted by the exact "
            "context; --decode-context applies the policy to the context"
        )
    return f"{policy} changed no expert's answer: the figures equal those of exact"
