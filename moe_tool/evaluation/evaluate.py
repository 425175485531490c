"""Work of `evaluate`: predict a text exactly and under each policy, and compare."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.evaluation_report import EvaluationReport, PolicyRow
from moe_tool.artifacts.run_result import RunSetup
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import BudgetError, UsageError
from moe_tool.evaluation.controls import policies_to_run
from moe_tool.evaluation.divergence import divergence_scratch_bytes
from moe_tool.evaluation.equal_bytes import compare_at_equal_bytes, dominating, priced_settings
from moe_tool.evaluation.figures import Measured, summarize
from moe_tool.evaluation.measure_policies import measure_policies
from moe_tool.evaluation.source_model import SourceModel
from moe_tool.evaluation.stepwise import reference_chunk
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.context_length import context_length
from moe_tool.models.locate import LocatedModel
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.misses import EXACT_POLICY, MissChoice
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.generation import run_setup
from moe_tool.runtime.moe_layer import Residency
from moe_tool.runtime.price_list import price_book
from moe_tool.runtime.run_options import RunOptions, default_policy, default_residency
from moe_tool.runtime.session import Session, load_session
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource

_REFERENCE_BYTES = 64 * 2**20
"""Bytes of reference logits kept for comparison, which limit the batch"""
_MAX_BATCH = 32
_NO_PRICES = "packed without a profile: no prices, so no comparison at equal bytes"
_MIN_SEQ_LEN = 3
"""Length of a sequence with a prompt, a token to feed, and one to predict"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Text, policies, and options of the session."""

    tokens: int = 4096
    """Tokens of text, all domains together; the first two of each sequence are not scored"""
    seq_len: int = 256
    """Tokens per sequence, capped at the model's context length"""
    memory: MemoryRequest | None = None
    policy: MissChoice | None = None
    """Policy; None: the calibrated or planned one, or exact"""
    also: tuple[MissChoice, ...] = ()
    """Further policies of the table"""
    exact_fallback: bool = True
    """Whether a calibrated policy answers exactly when it would exceed its limit"""
    controls: bool = False
    """Whether to measure the policy's controls too, under the same residency"""
    residency: Residency | None = None
    """Residency; None: frozen for lossy policies and tables, cache for exact alone"""
    eviction: EvictionChoice | None = None
    sparse_experts: float | None = None
    """See RunOptions; every sequence then runs alone"""
    gates: bool = True
    seed: int = 0
    """Seed of the choice of text, of random policies, and of the bootstrap"""
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The measurement to make, from options, bundle and text."""

    manifest: BundleManifest
    policy: MissChoice
    residency: Residency
    tokenizer: Any
    text: TokenSequences
    ids: torch.Tensor
    """[N, S] int64 token ids"""


def evaluate(
    folder: Path,
    sources: Sequence[TextSource],
    options: EvaluateOptions,
    *,
    reference: LocatedModel | None = None,
    progress: Progress = SILENT,
) -> EvaluationReport:
    """Measure a policy's divergence on a text from the same bundle with every miss fetched.

    Exact predictions are made many positions at once, a policy's always one token per forward with
    residency in the loop. Under frozen residency sequences share a forward: gates and answers are
    per sequence, so that batch composition affects only rounding. Under `cache` every sequence runs
    alone and starts with an empty cache. Hits and bytes are counted as if each sequence had run
    alone (see `TokenCosts`).

    Args:
        folder: the bundle.
        sources: the text, one domain each.
        options: policies and settings.
        reference: the checkpoint that the bundle was packed from, for KL(checkpoint || bundle).
        progress: listener.

    Raises:
        UsageError: options contradict each other, the bundle or the model.
        BudgetError: the memory budget is too small.
        DataSourceError, NotFoundError: the text cannot be read.
        WrongModelError: the reference is another model.
        CorruptArtifactError: the bundle or the checkpoint is damaged.
    """
    start = time.perf_counter()
    with BundleReader.open(folder) as bundle:
        asked = _read(bundle, sources, options, progress)
        ran = _run(bundle, asked, options, reference=reference, progress=progress)
    sparse = "" if options.sparse_experts is None else f", sparse {options.sparse_experts:g}"
    rows = {
        policy: _row(ran.names[policy] + sparse, measured, asked.text, options.seed)
        for policy, measured in ran.measured.items()
    }
    return EvaluationReport(
        bundle=str(folder),
        setup=replace(ran.setup, policy=rows[asked.policy].policy),
        gates=options.gates,
        seed=options.seed,
        sequences=len(asked.ids),
        seq_len=asked.ids.shape[1],
        rows=tuple(rows.values()),
        at_no_more_bytes=compare_at_equal_bytes(rows) if options.controls else (),
        dominating=dominating(rows) if options.controls else (),
        skipped=ran.skipped,
        sparsity=ran.decode.sparsity,
        whole_bytes_per_token=ran.decode.whole_bytes_per_token,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _read(
    bundle: BundleReader,
    sources: Sequence[TextSource],
    options: EvaluateOptions,
    progress: Progress,
) -> _Asked:
    folder, manifest = bundle.folder, bundle.manifest
    if options.sparse_experts is not None:
        _check_sparse(options)
    policy = options.policy or default_policy(manifest)
    tokenizer = load_tokenizer(folder)
    longest = context_length(read_config(folder).get_text_config())
    seq_len = min(options.seq_len, longest or options.seq_len)
    if seq_len < _MIN_SEQ_LEN:
        raise UsageError(f"--seq-len {seq_len}: at least {_MIN_SEQ_LEN} is needed")
    text = build_sequences(
        sources,
        tokenizer,
        vocabulary=manifest.shape.vocabulary,
        n_tokens=options.tokens,
        seq_len=seq_len,
        holdout=0.0,
        seed=options.seed,
        offline=options.offline,
        progress=progress,
    )
    usual: Residency = "frozen" if options.controls else default_residency(policy)
    return _Asked(
        manifest=manifest,
        policy=policy,
        residency=options.residency or usual,
        tokenizer=tokenizer,
        text=text,
        ids=torch.from_numpy(text.ids.astype(np.int64)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ran:
    """Results of the closed session."""

    measured: dict[MissChoice, Measured]
    names: dict[MissChoice, str]
    skipped: dict[str, str]
    setup: RunSetup
    decode: PhaseCounters


def _run(
    bundle: BundleReader,
    asked: _Asked,
    options: EvaluateOptions,
    *,
    reference: LocatedModel | None,
    progress: Progress,
) -> _Ran:
    with ExitStack() as stack:
        source = None
        if reference is not None:
            source = stack.enter_context(
                SourceModel(reference, asked.manifest, asked.ids, progress=progress)
            )
        wanted = _policies(asked, options, progress)
        session = _open(bundle, asked, options, has_source=source is not None, progress=progress)
        stack.enter_context(session)
        policies, skipped = _runnable(session, wanted, asked, progress)
        measured = measure_policies(
            session,
            policies,
            residency=asked.residency,
            ids=asked.ids,
            source=source,
            exact_fallback=options.exact_fallback,
            progress=progress,
        )
        setup, decode = run_setup(session), session.runner.stats.decode
    return _Ran(measured=measured, names=wanted, skipped=skipped, setup=setup, decode=decode)


def _check_sparse(options: EvaluateOptions) -> None:
    if options.controls or options.also or options.residency == "frozen":
        raise UsageError(
            f"--sparse-experts {options.sparse_experts:g} cannot be combined with --controls or "
            "--residency frozen: it is measured alone, sequence by sequence",
            hint="leave the others out",
        )


def _policies(asked: _Asked, options: EvaluateOptions, progress: Progress) -> dict[MissChoice, str]:
    """Return the requested policy, its controls, and `priced` at several strengths."""
    names = policies_to_run(asked.policy, asked.manifest, controls=options.controls)
    frontier = priced_settings(price_book(asked.manifest)) if options.controls else ()
    if options.controls and not frontier:
        progress.note(_NO_PRICES)
    return {policy: policy.name for policy in (*names, *frontier, *options.also)} | names


def _open(
    bundle: BundleReader,
    asked: _Asked,
    options: EvaluateOptions,
    *,
    has_source: bool,
    progress: Progress,
) -> Session:
    """Open the session with the largest batch of sequences that the budget allows."""
    n_sequences, seq_len = asked.ids.shape
    vocabulary = asked.manifest.shape.vocabulary
    per_sequence = (2 if has_source else 1) * seq_len * vocabulary * 4
    batch = 1
    if asked.residency == "frozen":
        batch = max(1, min(n_sequences, _MAX_BATCH, _REFERENCE_BYTES // per_sequence))
    scratch = 3 * reference_chunk(vocabulary) * vocabulary * 4
    scratch += divergence_scratch_bytes(vocabulary)
    if has_source:
        scratch += seq_len * vocabulary * 4
    run = RunOptions(
        memory=options.memory or _planned_slots(asked.manifest, progress),
        policy=EXACT_POLICY,
        residency=asked.residency,
        eviction=options.eviction,
        sparse_experts=options.sparse_experts,
        gates=options.gates,
        seed=options.seed,
        threads=options.threads,
        context=seq_len,
        prompt_tokens=seq_len,
    )
    while True:
        fitted = replace(run, batch=batch, caller_bytes=batch * per_sequence + scratch)
        try:
            return load_session(bundle, fitted, tokenizer=asked.tokenizer, progress=progress)
        except BudgetError:
            if batch == 1:
                raise
            batch //= 2


def _planned_slots(manifest: BundleManifest, progress: Progress) -> MemoryRequest | None:
    """Return the expert slots of the bundle's plan as a budget; None without a plan.

    The plan's bytes would give fewer slots, because reference logits take memory too.
    """
    if manifest.plan is None:
        return None
    n_slots, n_experts = manifest.plan.prediction.expert_slots, len(manifest.primary_records)
    progress.note(f"as planned: {n_slots} of {n_experts} expert slots")
    return MemoryRequest(kind="slots", n_slots=n_slots)


def _runnable(
    session: Session, wanted: dict[MissChoice, str], asked: _Asked, progress: Progress
) -> tuple[list[MissChoice], dict[str, str]]:
    """Return the policies that the bundle can run, and the reasons against the other controls.

    Raises:
        UsageError: the bundle cannot run the requested policy.
    """
    kept, skipped = [], {}
    for policy, name in wanted.items():
        try:
            session.use_policy(policy, residency=asked.residency)
        except UsageError as error:
            if policy == asked.policy:
                raise
            skipped[name] = error.message
            progress.note(f"{name} is skipped: {error.message}")
        else:
            kept.append(policy)
    return kept, skipped


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
