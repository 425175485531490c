"""`moe-tool eval-harness`: run tasks of lm-evaluation-harness on a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.cli.console import Output, open_output
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
    from moe_tool.artifacts.evaluation_report import HarnessReport


_Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="NAME,...",
        help="Tasks of lm_eval by name, or YAML files and folders by path (./mine.yaml).",
        show_default=False,
    ),
]
_Include = Annotated[
    list[Path] | None,
    typer.Option(
        "--include",
        metavar="DIR",
        help="A folder with more tasks to name. May be repeated.",
        show_default=False,
    ),
]
_Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Documents per task.", show_default="all"),
]
_NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot",
        metavar="N",
        min=0,
        help="Solved examples before each question.",
        show_default="the task's",
    ),
]
_Context = Annotated[
    int,
    typer.Option(
        "--context",
        metavar="N",
        min=2,
        help="Tokens of context and answer together; longer contexts are cut at the beginning.",
    ),
]
_DecodeContext = Annotated[
    bool,
    typer.Option(
        "--decode-context",
        help="In log-likelihoods, apply the policy to the context too, from its second token on. "
        "Otherwise the context is an exact prompt, and the first answer token is exact too.",
    ),
]


def eval_harness(
    bundle: BundleArgument,
    tasks: _Tasks,
    include: _Include = None,
    limit: _Limit = None,
    num_fewshot: _NumFewshot = None,
    context: _Context = 4096,
    decode_context: _DecodeContext = False,
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

        from moe_tool.runtime.run_options import run_options

        run = run_options(
            memory=memory,
            policy=policy,
            residency=residency,
            eviction=eviction,
            gates=gates,
            lossy_prompt=lossy_prefill,
            seed=seed,
            threads=threads,
            context=context,
        )
        options = HarnessOptions(
            tasks=names,
            include=tuple(include or ()),
            limit=limit,
            num_fewshot=num_fewshot,
            decode_context=decode_context,
            offline=offline,
        )
        report = run_harness(bundle, run, options, progress=output.progress)
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
