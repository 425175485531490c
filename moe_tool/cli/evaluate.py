"""`moe-tool evaluate`: measure the quality and the reads of a policy on text."""

from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.budget.request import parse_memory_option
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import (
    BundleArgument,
    DataOption,
    EvictionOption,
    GatesOption,
    JsonOption,
    OfflineOption,
    PolicyOption,
    ResidencyOption,
    RunMemoryOption,
    SeedOption,
    SparseExpertsOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from moe_tool.artifacts.evaluation_report import EvaluationReport

_Tokens = Annotated[
    int, typer.Option("--tokens", metavar="N", min=1, help="Tokens of text, all domains together.")
]
_SeqLen = Annotated[int, typer.Option("--seq-len", metavar="N", min=3, help="Tokens per sequence.")]
_Controls = Annotated[
    bool, typer.Option("--controls", help="Also measure the policy's controls, in the same table.")
]
_Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="MODEL",
        help="Also compare with this checkpoint, not only with the exact bundle.",
        show_default=False,
    ),
]


def evaluate(
    bundle: BundleArgument,
    data: DataOption,
    tokens: _Tokens = 4096,
    seq_len: _SeqLen = 256,
    memory: RunMemoryOption = None,
    policy: PolicyOption = None,
    residency: ResidencyOption = None,
    eviction: EvictionOption = None,
    sparse_experts: SparseExpertsOption = None,
    gates: GatesOption = True,
    controls: _Controls = False,
    reference: _Reference = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Measure perplexity, and a policy's divergence from exact."""
    with open_output(as_json=json) as output:
        from moe_tool.models.locate import locate_model
        from moe_tool.policies.eviction import parse_eviction
        from moe_tool.policies.misses import parse_miss_policy
        from moe_tool.text.sources import parse_sources, require_sources

        policy_choice = None if policy is None else parse_miss_policy(policy)
        eviction_choice = None if eviction is None else parse_eviction(eviction)
        sources = parse_sources(data)
        require_sources(sources, offline=offline)
        located = None
        if reference is not None:
            located = locate_model(reference, offline=offline, announce=output.say)

        from moe_tool.evaluation.evaluate import EvaluateOptions
        from moe_tool.evaluation.evaluate import evaluate as measure

        options = EvaluateOptions(
            tokens=tokens,
            seq_len=seq_len,
            memory=parse_memory_option(memory),
            policy=policy_choice,
            controls=controls,
            residency=residency,
            eviction=eviction_choice,
            sparse_experts=sparse_experts,
            gates=gates,
            seed=seed,
            threads=threads,
            offline=offline,
        )
        report = measure(bundle, sources, options, reference=located, progress=output.progress)
        _show(report, output, controls=controls, has_reference=reference is not None)
        output.result(report)


def _show(
    report: "EvaluationReport", output: Output, *, controls: bool, has_reference: bool
) -> None:
    from moe_tool.reports.evaluation_tables import (
        checkpoint_perplexity,
        dominance,
        equal_bytes_table,
        evaluation_table,
    )

    figures, setup = report.figures, report.setup
    output.show(
        f"{figures.tokens} predictions, {setup.residency} residency",
        evaluation_table(report.by_policy()),
    )
    if report.at_no_more_bytes:
        output.show("at no more bytes per token", equal_bytes_table(report), dominance(report))
    if has_reference:
        output.show(checkpoint_perplexity(figures))
    if setup.sparse_experts is not None:
        output.show(
            f"{report.sparsity:.1%} of experts' channels were skipped; misses read "
            f"{format_bytes(figures.bytes_read_per_token.value)} per token instead of "
            f"{format_bytes(report.whole_bytes_per_token)} for whole experts"
        )
    if len(report.domains) > 1 and controls:
        for domain in report.domains:
            rows = {row.policy: row.domains[domain] for row in report.rows}
            output.show(domain, evaluation_table(rows))
    elif len(report.domains) > 1:
        output.show(f"{setup.policy} by domain", evaluation_table(report.domains))
    output.say(
        f"{report.seconds:.1f} s, peak memory {format_bytes(report.peak_rss_bytes)} "
        f"of {format_bytes(setup.memory_budget_bytes)}"
    )
    if not controls and setup.policy != "exact":
        output.say("next: --controls compares the policy with simpler ones")
