"""The story of `evaluate`: exact predictions, then each policy's, token by token, and how far apart
they are."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import BudgetError, UsageError
from moe_tool.evaluation.controls import policies_to_run
from moe_tool.evaluation.divergence import (
    compare_logits,
    divergence_scratch_bytes,
    negative_log_likelihood,
)
from moe_tool.evaluation.equal_bytes import (
    AtNoMoreBytes,
    compare_at_equal_bytes,
    dominating,
    priced_settings,
)
from moe_tool.evaluation.figures import Figures, Measured, summarize
from moe_tool.evaluation.source_model import SourceModel
from moe_tool.evaluation.stepwise import (
    N_PROMPT_TOKENS,
    TokenCosts,
    exact_logits,
    n_scored,
    reference_chunk,
    run_stepwise,
)
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.context_length import context_length
from moe_tool.models.locate import LocatedModel
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.moe_layer import Residency
from moe_tool.runtime.policy_choice import EXACT, require_policy
from moe_tool.runtime.price_list import price_book
from moe_tool.runtime.quality_account import QualityAccount
from moe_tool.runtime.run_options import RunOptions, default_policy
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource

_REFERENCE_BYTES = 64 * 2**20
"""Predictions kept at once for comparison: they decide how many sequences go through together"""
_MAX_BATCH = 32
_NO_PRICES = "packed without a profile: without prices nothing can be compared at equal bytes"
_MIN_SEQ_LEN = 3
"""A prompt, a token that is fed, and one that is predicted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What is measured, and how the bundle runs meanwhile."""

    tokens: int = 4096
    """Of text, all domains together; the first two of each sequence are not scored"""
    seq_len: int = 256
    """Capped at what the model was made for"""
    memory: str | None = None
    policy: str | None = None
    """None: what the bundle was calibrated or planned for, or exact"""
    also: tuple[str, ...] = ()
    """Further policies of the table"""
    retreats: bool = True
    """Whether a calibrated policy answers exactly where it would leave its limit"""
    controls: bool = False
    """Also measure the policy's controls, under the same residency"""
    residency: Residency | None = None
    """None: frozen for lossy policies and tables, cache for exact alone"""
    eviction: str | None = None
    sparse_experts: float | None = None
    """See RunOptions; every sequence then runs alone"""
    gates: bool = True
    seed: int = 0
    """Of the choice of text, of policies that draw, and of the bootstrap"""
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """One row of the table."""

    policy: str
    figures: Figures
    domains: dict[str, Figures]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """The policy that was asked for, and its controls where they were."""

    bundle: str
    policy: str
    residency: str
    gates: bool
    seed: int
    sequences: int
    seq_len: int
    figures: Figures
    domains: dict[str, Figures]
    rows: tuple[PolicyRow, ...]
    """Every policy that ran, in the order of the table"""
    at_no_more_bytes: tuple[AtNoMoreBytes, ...]
    """With controls: every other lossy policy beside answering by price; empty without prices"""
    dominating: tuple[tuple[str, str], ...]
    """(policy, setting of `priced`): both fewer bytes and a lower KL, beyond the intervals"""
    skipped: dict[str, str]
    """Controls that this bundle cannot run -> why"""
    sparse_experts: float | None
    """Share of experts' channels that was to be left out; None: none"""
    sparsity: float
    """That was left out"""
    whole_bytes_per_token: float
    """What misses would have read of experts in channels, had all been read whole"""
    memory_budget_bytes: int
    slots: int
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `--json`: the figures at the top level, everything else beside
        them."""
        fields = asdict(self)
        figures = fields.pop("figures")
        for each, row in zip(fields["at_no_more_bytes"], self.at_no_more_bytes, strict=True):
            each["ratio"] = row.ratio
        return {**figures, **fields}


@dataclass(slots=True, kw_only=True)
class _Tally:
    """[N, P] arrays of one policy, filled batch by batch."""

    kl: np.ndarray
    agrees: np.ndarray
    nll: np.ndarray
    kl_source: np.ndarray
    costs: TokenCosts


def evaluate(
    folder: Path,
    sources: Sequence[TextSource],
    options: EvaluateOptions,
    *,
    reference: LocatedModel | None = None,
    progress: Progress = SILENT,
) -> EvaluationReport:
    """Measure what a policy costs on a text, against the same bundle with every miss fetched.

    Exact predictions are made many positions at once; whatever the policy, its own are made one
    token per forward with residency in the loop. Under frozen residency sequences share a forward:
    gates and answers are per sequence, so that the company changes nothing but rounding. Under
    `cache` every sequence runs alone and starts with an empty cache. Hits and bytes are counted as
    if each sequence had run alone (see `TokenCosts`).

    Args:
        folder: of the bundle.
        sources: the text, one domain each.
        options: what is measured.
        reference: the checkpoint the bundle was packed from, for KL(checkpoint || bundle).
        progress: told about every policy.

    Raises:
        UsageError: options that contradict each other, the bundle or the model.
        BudgetError: the memory budget does not suffice.
        DataSourceError, NotFoundError: the text.
        WrongModelError: the reference is another model.
        CorruptArtifactError: the bundle or the checkpoint is damaged.
    """
    start = time.perf_counter()
    require_policy(options.policy or EXACT)
    bundle = BundleReader.open(folder)
    policy = options.policy or default_policy(bundle.manifest)
    tokenizer = load_tokenizer(folder)
    longest = context_length(read_config(folder).get_text_config())
    seq_len = min(options.seq_len, longest or options.seq_len)
    if seq_len < _MIN_SEQ_LEN:
        raise UsageError(f"--seq-len {seq_len}: at least {_MIN_SEQ_LEN} is needed")
    text = build_sequences(
        sources,
        tokenizer,
        vocabulary=bundle.manifest.shape.vocabulary,
        n_tokens=options.tokens,
        seq_len=seq_len,
        holdout=0.0,
        seed=options.seed,
        offline=options.offline,
    )
    ids = torch.from_numpy(text.ids.astype(np.int64))  # [N, S]
    source = None
    try:
        if reference is not None:
            source = SourceModel(reference, bundle.manifest, ids, progress=progress)
        if options.sparse_experts is not None:
            _check_sparse(options)
        is_table = options.controls or policy != EXACT
        residency: Residency = options.residency or ("frozen" if is_table else "cache")
        names = policies_to_run(policy, bundle.manifest, controls=options.controls)
        frontier: tuple[str, ...] = ()
        if options.controls:
            frontier = priced_settings(price_book(bundle.manifest))
            if not frontier:
                progress.note(_NO_PRICES)
        names = tuple(dict.fromkeys((*names, *frontier, *options.also)))
        with _open(folder, options, ids, residency, tokenizer, source, bundle, progress) as session:
            names, skipped = _runnable(session, names, policy, residency, progress)
            rows = _measure(
                session, names, residency, ids, source, progress, retreats=options.retreats
            )
            plan, decode = session.plan, session.runner.stats.decode
    finally:
        if source is not None:
            source.close()
    if options.sparse_experts is not None:
        label = f"{policy}, sparse {options.sparse_experts:g}"
        rows, policy = {label: rows[policy]}, label
    table = tuple(_row(name, measured, text, options.seed) for name, measured in rows.items())
    by_policy = {row.policy: row.figures for row in table}
    main = next(row for row in table if row.policy == policy)
    return EvaluationReport(
        bundle=str(folder),
        policy=policy,
        residency=residency,
        gates=options.gates,
        seed=options.seed,
        sequences=len(ids),
        seq_len=seq_len,
        figures=main.figures,
        domains=main.domains,
        rows=table,
        at_no_more_bytes=compare_at_equal_bytes(by_policy) if options.controls else (),
        dominating=dominating(by_policy) if options.controls else (),
        skipped=skipped,
        sparse_experts=options.sparse_experts,
        sparsity=decode.sparsity,
        whole_bytes_per_token=decode.whole_bytes / max(1, decode.tokens),
        memory_budget_bytes=plan.budget_bytes,
        slots=plan.n_slots,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _open(
    folder: Path,
    options: EvaluateOptions,
    ids: torch.Tensor,
    residency: Residency,
    tokenizer: Any,
    source: SourceModel | None,
    bundle: BundleReader,
    progress: Progress,
) -> Session:
    """Open the session with as many sequences at a time as the budget allows."""
    n_sequences, seq_len = ids.shape
    vocabulary = bundle.manifest.shape.vocabulary
    n_references = 1 if source is None else 2
    per_sequence = n_references * seq_len * vocabulary * 4
    batch = 1
    if residency == "frozen":
        batch = max(1, min(n_sequences, _MAX_BATCH, _REFERENCE_BYTES // per_sequence))
    scratch = 3 * reference_chunk(vocabulary) * vocabulary * 4 + divergence_scratch_bytes(
        vocabulary
    )
    if source is not None:
        scratch += seq_len * vocabulary * 4
    run = RunOptions(
        memory=options.memory or _planned_share(bundle, progress),
        policy=EXACT,
        residency=residency,
        eviction=options.eviction,
        sparse_experts=options.sparse_experts,
        gates=options.gates,
        seed=options.seed,
        threads=options.threads,
        context=seq_len,
        prompt=seq_len,
    )
    while True:
        caller_bytes = batch * per_sequence + scratch
        try:
            return open_session(
                folder,
                replace(run, batch=batch, caller_bytes=caller_bytes),
                tokenizer=tokenizer,
                progress=progress,
            )
        except BudgetError:
            if batch == 1:
                raise
            batch //= 2


def _check_sparse(options: EvaluateOptions) -> None:
    if options.controls or options.also or options.residency == "frozen":
        raise UsageError(
            f"--sparse-experts {options.sparse_experts:g} beside --controls or --residency frozen: "
            "what is left out is measured by itself, sequence by sequence",
            hint="leave the others out",
        )


def _planned_share(bundle: BundleReader, progress: Progress) -> str | None:
    """As `--memory`, the expert slots of the bundle's plan; None without one. What is to be
    compared is held beside them, so that the plan's bytes would buy fewer."""
    plan = bundle.manifest.plan
    if plan is None:
        return None
    n_slots, n_experts = plan.prediction.expert_slots, len(bundle.manifest.own_records)
    progress.note(f"as planned: {n_slots} of {n_experts} expert slots")
    return f"{min(100.0, 100 * (n_slots + 0.5) / n_experts):.6f}%"


def _runnable(
    session: Session,
    names: tuple[str, ...],
    wanted: str,
    residency: Residency,
    progress: Progress,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Leave out controls that the bundle lacks something for; the policy that was asked for has to
    run."""
    kept, skipped = [], {}
    for name in names:
        try:
            session.use_policy(name, residency=residency)
        except UsageError as error:
            if name == wanted:
                raise
            skipped[name] = error.message
            progress.note(f"{name} is left out: {error.message}")
        else:
            kept.append(name)
    return tuple(kept), skipped


def _measure(
    session: Session,
    names: tuple[str, ...],
    residency: Residency,
    ids: torch.Tensor,
    source: SourceModel | None,
    progress: Progress,
    *,
    retreats: bool,
) -> dict[str, Measured]:
    """Run every policy on every batch; the exact predictions of one batch at a time are kept."""
    n_sequences, seq_len = ids.shape
    shape = (n_sequences, n_scored(seq_len))
    nll_exact, kl_source_exact, nll_source = (np.zeros(shape) for _ in range(3))
    tallies = {name: _empty_tally(shape) for name in names}
    scored = slice(N_PROMPT_TOKENS, seq_len - 1)
    progress.begin("evaluate", n_sequences * len(names), "sequences")
    for first in range(0, n_sequences, session.workload.batch):
        rows = slice(first, min(first + session.workload.batch, n_sequences))
        batch = ids[rows]
        exact = exact_logits(session, batch)  # [B, S, V]
        truth = None
        if source is not None:
            truth = torch.empty_like(exact)
            for row in range(len(batch)):
                truth[row] = source.logits(first + row)
        for row in range(len(batch)):
            targets = batch[row, scored.start + 1 : scored.stop + 1]
            nll_exact[first + row] = negative_log_likelihood(exact[row, scored], targets)
            if truth is not None:
                nll_source[first + row] = negative_log_likelihood(truth[row, scored], targets)
                kl_source_exact[first + row] = compare_logits(
                    truth[row, scored], exact[row, scored]
                ).kl
        for name in names:
            session.use_policy(name, residency=residency)
            if not retreats:
                session.runner.account = QualityAccount()
            if residency == "cache":
                session.empty_cache()
            _run_policy(session, tallies[name], rows, batch, exact, truth)
            progress.advance(len(batch))
        del exact, truth
    progress.end()
    return {
        name: _measured(
            tally,
            nll_exact,
            None if source is None else kl_source_exact,
            None if source is None else nll_source,
            is_exact=name == EXACT and session.runner.sparsity is None,
        )
        for name, tally in tallies.items()
    }


def _run_policy(
    session: Session,
    tally: _Tally,
    rows: slice,
    batch: torch.Tensor,
    exact: torch.Tensor,
    truth: torch.Tensor | None,
) -> None:
    def visit(position: int, logits: torch.Tensor) -> None:
        column = position - N_PROMPT_TOKENS
        judged = compare_logits(exact[:, position], logits)
        tally.kl[rows, column] = judged.kl
        tally.agrees[rows, column] = judged.agrees
        tally.nll[rows, column] = negative_log_likelihood(logits, batch[:, position + 1])
        if truth is not None:
            tally.kl_source[rows, column] = compare_logits(truth[:, position], logits).kl

    costs = run_stepwise(session, batch, visit)
    for name in TokenCosts.__dataclass_fields__:
        getattr(tally.costs, name)[rows] = getattr(costs, name)


def _empty_tally(shape: tuple[int, int]) -> _Tally:
    counts = {name: np.zeros(shape) for name in TokenCosts.__dataclass_fields__}
    return _Tally(
        kl=np.zeros(shape),
        agrees=np.zeros(shape, dtype=bool),
        nll=np.zeros(shape),
        kl_source=np.zeros(shape),
        costs=TokenCosts(**counts),
    )


def _measured(
    tally: _Tally,
    nll_exact: np.ndarray,
    kl_source_exact: np.ndarray | None,
    nll_source: np.ndarray | None,
    *,
    is_exact: bool,
) -> Measured:
    """Exact is exact by definition: what differs between one wide forward and many small ones is
    rounding."""
    has_source = kl_source_exact is not None
    return Measured(
        kl=np.zeros_like(tally.kl) if is_exact else tally.kl,
        agrees=np.ones_like(tally.agrees) if is_exact else tally.agrees,
        nll=nll_exact if is_exact else tally.nll,
        nll_exact=nll_exact,
        kl_source=(kl_source_exact if is_exact else tally.kl_source) if has_source else None,
        kl_source_exact=kl_source_exact,
        nll_source=nll_source,
        costs=tally.costs,
    )


def _row(name: str, measured: Measured, text: TokenSequences, seed: int) -> PolicyRow:
    everything = np.ones(len(text.ids), dtype=bool)
    return PolicyRow(
        policy=name,
        figures=summarize(measured, everything, seed=seed),
        domains={
            domain: summarize(measured, text.domain == index, seed=seed)
            for index, domain in enumerate(text.domains)
        },
    )
