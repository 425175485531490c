"""`moe-tool evaluate`: measure the quality and the reads of a policy on text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.budget.request import parse_memory_option
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.lookup import is_lookup_folder, require_rows_options
from moe_tool.cli.options import (
    ActivationsOption,
    BundleArgument,
    DataOption,
    EvictionOption,
    GatesOption,
    OfflineOption,
    PolicyOption,
    ResidencyOption,
    RunMemoryOption,
    SeedOption,
    SparseExpertsOption,
    ThreadsOption,
)
from moe_tool.cli.verb import options_from, verb

if TYPE_CHECKING:
    from moe_tool.artifacts.evaluation_report import EvaluationReport


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateArguments:
    bundle: BundleArgument
    data: DataOption
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of text, all domains together.")
    ] = 4096
    seq_len: Annotated[int, typer.Option(metavar="N", min=3, help="Tokens per sequence.")] = 256
    memory: RunMemoryOption = None
    policy: PolicyOption = None
    residency: ResidencyOption = None
    eviction: EvictionOption = None
    sparse_experts: SparseExpertsOption = None
    activations: ActivationsOption = "float32"
    gates: GatesOption = True
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also measure the policy's controls, in the same table."),
    ] = False
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Also compare with this checkpoint, not only with the exact bundle, whose norms "
            "and routers may have been tuned.",
            show_default=False,
        ),
    ] = None
    seed: SeedOption = 0
    threads: ThreadsOption = None
    offline: OfflineOption = False


@verb
def evaluate(given: EvaluateArguments, output: Output) -> None:
    """Measure perplexity, and a policy's divergence from exact."""
    from moe_tool.models.locate import locate_model
    from moe_tool.policies.eviction import parse_eviction
    from moe_tool.policies.misses import parse_miss_policy
    from moe_tool.text.sources import parse_sources, require_sources

    policy = None if given.policy is None else parse_miss_policy(given.policy)
    eviction = None if given.eviction is None else parse_eviction(given.eviction)
    sources = parse_sources(given.data)
    require_sources(sources, offline=given.offline)
    located = None
    if given.reference is not None:
        located = locate_model(given.reference, offline=given.offline, announce=output.say)

    from moe_tool.evaluation.evaluate import EvaluateOptions

    options = options_from(
        given,
        EvaluateOptions,
        memory=parse_memory_option(given.memory),
        policy=policy,
        also=(),
        exact_fallback=True,
        eviction=eviction,
    )
    is_lookup = is_lookup_folder(given.bundle)
    if is_lookup:
        from moe_tool.evaluation.evaluate_lookup import evaluate_lookup as measure

        require_rows_options(given)
    else:
        from moe_tool.evaluation.evaluate import evaluate as measure
    report = measure(given.bundle, sources, options, reference=located, progress=output.progress)
    where = "rows on disk" if is_lookup else f"{report.setup.residency} residency"
    _show(report, given, output, where)
    output.result(report)


def _show(report: "EvaluationReport", given: EvaluateArguments, output: Output, where: str) -> None:
    from moe_tool.reports.evaluation_tables import (
        checkpoint_perplexity,
        dominance,
        equal_bytes_table,
        evaluation_table,
    )

    figures, setup = report.figures, report.setup
    output.show(f"{figures.tokens} predictions, {where}", evaluation_table(report.by_policy()))
    if report.at_no_more_bytes:
        output.show("at no more bytes per token", equal_bytes_table(report), dominance(report))
    if given.reference is not None:
        output.show(checkpoint_perplexity(figures))
    if setup.sparse_experts is not None:
        output.show(
            f"{report.sparsity:.1%} of experts' channels were skipped; misses read "
            f"{format_bytes(figures.bytes_read_per_token.value)} per token instead of "
            f"{format_bytes(report.whole_bytes_per_token)} for whole experts"
        )
    if len(report.domains) > 1 and given.controls:
        for domain in report.domains:
            rows = {row.policy: row.domains[domain] for row in report.rows}
            output.show(domain, evaluation_table(rows))
    elif len(report.domains) > 1:
        output.show(f"{setup.policy} by domain", evaluation_table(report.domains))
    output.say(
        f"{report.seconds:.1f} s, peak memory {format_bytes(report.peak_rss_bytes)} "
        f"of {format_bytes(setup.memory_budget_bytes)}"
        + (", int8 activations compared with float32" if setup.activations == "int8" else "")
    )
    if not given.controls and setup.policy != "exact":
        output.say("next: --controls compares the policy with simpler ones")
