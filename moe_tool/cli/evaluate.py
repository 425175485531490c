"""`moe-tool evaluate`: a bundle and a text in, what a policy costs out."""

from typing import Annotated

import typer

from moe_tool.budget.request import parse_memory_option
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import open_output
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


def evaluate(
    bundle: BundleArgument,
    data: DataOption,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=1, help="Tokens of text, of all domains.")
    ] = 4096,
    seq_len: Annotated[
        int, typer.Option("--seq-len", metavar="N", min=3, help="Tokens of one sequence.")
    ] = 256,
    memory: RunMemoryOption = None,
    policy: PolicyOption = None,
    residency: ResidencyOption = None,
    eviction: EvictionOption = None,
    sparse_experts: SparseExpertsOption = None,
    gates: GatesOption = True,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also the policy's controls, in one table."),
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="Also compare with this checkpoint, not only with the bundle itself.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Measure perplexity, and how far a policy is from exact."""
    with open_output(as_json=json) as output:
        from moe_tool.models.locate import locate_model
        from moe_tool.text.sources import parse_sources, require_sources

        sources = parse_sources(data)
        require_sources(sources, offline=offline)
        located = None
        if reference is not None:
            located = locate_model(reference, offline=offline, announce=output.say)

        from moe_tool.evaluation.evaluate import EvaluateOptions
        from moe_tool.evaluation.evaluate import evaluate as measure
        from moe_tool.reports.terminal import (
            checkpoint_perplexity,
            equal_bytes_table,
            evaluation_table,
        )

        report = measure(
            bundle,
            sources,
            EvaluateOptions(
                tokens=tokens,
                seq_len=seq_len,
                memory=parse_memory_option(memory),
                policy=policy,
                controls=controls,
                residency=residency,
                eviction=eviction,
                sparse_experts=sparse_experts,
                gates=gates,
                seed=seed,
                threads=threads,
                offline=offline,
            ),
            reference=located,
            progress=output.progress,
        )
        output.show(
            f"{report.figures.tokens} predictions, {report.residency} residency",
            evaluation_table([(row.policy, row.figures) for row in report.rows]),
        )
        if report.at_no_more_bytes:
            output.show("at no more bytes per token", equal_bytes_table(report.at_no_more_bytes))
            output.show(_dominance(report.dominating))
        if reference is not None:
            output.show(checkpoint_perplexity(report.figures))
        if report.sparse_experts is not None:
            output.show(
                f"{report.sparsity:.1%} of experts' channels were left out; misses read "
                f"{format_bytes(report.figures.bytes_read_per_token)} per token, whole experts "
                f"would have been {format_bytes(report.whole_bytes_per_token)}"
            )
        if len(report.domains) > 1 and controls:
            for domain in report.domains:
                rows = [(row.policy, row.domains[domain]) for row in report.rows]
                output.show(domain, evaluation_table(rows))
        elif len(report.domains) > 1:
            output.show(
                f"{report.policy} by domain", evaluation_table(list(report.domains.items()))
            )
        output.say(
            f"{report.seconds:.1f} s, peak memory {format_bytes(report.peak_rss_bytes)} "
            f"of {format_bytes(report.memory_budget_bytes)}"
        )
        if not controls and report.policy != "exact":
            output.say("next: the same with --controls shows what the policy is worth")
        output.result(report.to_json())


def _dominance(found: tuple[tuple[str, str], ...]) -> str:
    if not found:
        return (
            "no other lossy policy has both fewer bytes and a lower KL than priced, beyond the "
            "intervals"
        )
    return "both fewer bytes and a lower KL, beyond the intervals: " + ", ".join(
        f"{policy} than {setting}" for policy, setting in found
    )
