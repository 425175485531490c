"""Work of `evaluate`: predict a text exactly and under each policy, and compare."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.evaluation_report import EvaluationReport, PolicyRow
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import BudgetError, UsageError
from moe_tool.evaluation.divergence import divergence_scratch_bytes
from moe_tool.evaluation.equal_bytes import compare_at_equal_bytes, dominating, priced_settings
from moe_tool.evaluation.figures import Measured, policy_row
from moe_tool.evaluation.measure_policies import measure_policies
from moe_tool.evaluation.source_model import SourceModel
from moe_tool.evaluation.stepwise import reference_chunk
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.context_length import context_length
from moe_tool.models.locate import LocatedModel
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.misses import EXACT_POLICY, MISS_POLICIES, MissChoice, parse_miss_policy
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.activations import PRICED_NOTE, Activations
from moe_tool.runtime.generation import run_setup
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.policy_choice import manifest_inputs
from moe_tool.runtime.price_list import price_book
from moe_tool.runtime.run_options import (
    RunOptions,
    default_eviction,
    default_policy,
    default_residency,
)
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
    activations: Activations = "float32"
    """See RunOptions; exact predictions, to compare with, are made in float32"""
    gates: bool = True
    seed: int = 0
    """Seed of the choice of text, of random policies, and of the bootstrap"""
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The measurement to make, from options, bundle and text."""

    policy: MissChoice
    names: dict[MissChoice, str]
    """Policies of the table, with their names there"""
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
        reference: the checkpoint that the bundle was packed from, for KL(checkpoint || bundle).

    Raises:
        UsageError: options contradict each other, the bundle or the model.
        BudgetError: the memory budget is too small.
        DataSourceError, NotFoundError: the text cannot be read.
        WrongModelError: the reference is another model.
        CorruptArtifactError: the bundle or the checkpoint is damaged.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        bundle = stack.enter_context(BundleReader.open(folder))
        asked, source = _read(bundle, sources, options, progress), None
        if reference is not None:
            source = SourceModel(reference, bundle.manifest, asked.ids, progress=progress)
            stack.callback(source.close)
        session = _open(bundle, asked, options, source is not None, progress)
        stack.enter_context(session)
        if options.activations != "float32":
            progress.note(PRICED_NOTE)
        measured, skipped = _measure(session, asked, options, source, progress)
        setup, decode = run_setup(session), session.runner.stats.decode
    rows = _rows(measured, asked, options)
    return EvaluationReport(
        bundle=str(folder),
        setup=replace(setup, policy=rows[asked.policy].policy),
        gates=options.gates,
        seed=options.seed,
        sequences=len(asked.ids),
        seq_len=asked.ids.shape[1],
        rows=tuple(rows.values()),
        at_no_more_bytes=compare_at_equal_bytes(rows) if options.controls else (),
        dominating=dominating(rows) if options.controls else (),
        skipped=skipped,
        sparsity=decode.sparsity,
        whole_bytes_per_token=decode.whole_bytes_per_token,
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
    is_alone = not (options.controls or options.also or options.residency == "frozen")
    if options.sparse_experts is not None and not is_alone:
        raise UsageError(
            f"--sparse-experts {options.sparse_experts:g} cannot be combined with --controls or "
            "--residency frozen: it is measured alone, sequence by sequence",
            hint="leave the others out",
        )
    policy = options.policy or default_policy(manifest)
    vocabulary = manifest.shape.vocabulary
    tokenizer, text = read_text(folder, sources, options, vocabulary=vocabulary, progress=progress)
    usual: Residency = "frozen" if options.controls else default_residency(policy, manifest)
    return _Asked(
        policy=policy,
        names=_policies(policy, manifest, options, progress),
        residency=options.residency or usual,
        tokenizer=tokenizer,
        text=text,
        ids=torch.from_numpy(text.ids.astype(np.int64)),
    )


def read_text(
    folder: Path,
    sources: Sequence[TextSource],
    options: EvaluateOptions,
    *,
    vocabulary: int,
    progress: Progress,
) -> tuple[Any, TokenSequences]:
    """Return a bundle's tokenizer, and the text cut into sequences that its model can take.

    Raises:
        UsageError: the sequences are too short.
        DataSourceError, NotFoundError: the text cannot be read.
    """
    tokenizer = load_tokenizer(folder)
    longest = context_length(read_config(folder).get_text_config())
    seq_len = min(options.seq_len, longest or options.seq_len)
    if seq_len < _MIN_SEQ_LEN:
        raise UsageError(f"--seq-len {seq_len}: at least {_MIN_SEQ_LEN} is needed")
    text = build_sequences(
        sources,
        tokenizer,
        vocabulary=vocabulary,
        n_tokens=options.tokens,
        seq_len=seq_len,
        holdout=0.0,
        seed=options.seed,
        offline=options.offline,
        progress=progress,
    )
    return tokenizer, text


def _policies(
    policy: MissChoice, manifest: BundleManifest, options: EvaluateOptions, progress: Progress
) -> dict[MissChoice, str]:
    """Return the policies of the table with their names there: the requested one, its controls, and
    `priced` at several strengths.

    Of the controls exact comes first: it shows the bytes that the same residency reads without
    lossy answers. Then come the policy's own controls, or else all policies marked as controls:
    random and drop are baselines for any choice of stand-in, next-ranked is one that needs no buddy
    map.
    """
    if not options.controls:
        return {each: each.name for each in (policy, *options.also)}
    frontier = priced_settings(price_book(manifest))
    if not frontier:
        progress.note(_NO_PRICES)
    own = policy.spec.controls
    found = None if own is None else own(policy.values, manifest_inputs(manifest))
    if found is None:
        found = tuple(name for name, spec in MISS_POLICIES.items() if spec.in_controls)
    names = {each: each.name for each in (EXACT_POLICY, policy)}
    names |= {parse_miss_policy(name): name for name in found}
    return {each: each.name for each in (*names, *frontier, *options.also)} | names


def _open(
    bundle: BundleReader,
    asked: _Asked,
    options: EvaluateOptions,
    has_source: bool,
    progress: Progress,
) -> Session:
    """Open the session with the largest batch of sequences that the budget allows."""
    n_sequences, seq_len = asked.ids.shape
    vocabulary = bundle.manifest.shape.vocabulary
    per_sequence = (2 if has_source else 1) * seq_len * vocabulary * 4
    batch = 1
    if asked.residency == "frozen":
        batch = max(1, min(n_sequences, _MAX_BATCH, _REFERENCE_BYTES // per_sequence))
    scratch = 3 * reference_chunk(vocabulary) * vocabulary * 4
    scratch += divergence_scratch_bytes(vocabulary)
    if has_source:
        scratch += seq_len * vocabulary * 4
    run = RunOptions(
        memory=options.memory or _planned_slots(bundle.manifest, progress),
        policy=EXACT_POLICY,
        residency=asked.residency,
        eviction=options.eviction or default_eviction(asked.policy, asked.residency)
        if asked.residency == "cache"
        else None,
        sparse_experts=options.sparse_experts,
        activations=options.activations,
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


def _measure(
    session: Session,
    asked: _Asked,
    options: EvaluateOptions,
    source: SourceModel | None,
    progress: Progress,
) -> tuple[dict[MissChoice, Measured], dict[str, str]]:
    """Return the measurements of the policies that the bundle can run, and the reasons against the
    other controls.

    Raises:
        UsageError: the bundle cannot run the requested policy.
    """
    kept, skipped = [], {}
    for policy, name in asked.names.items():
        try:
            session.use_policy(policy, residency=asked.residency)
        except UsageError as error:
            if policy == asked.policy:
                raise
            skipped[name] = error.message
            progress.note(f"{name} is skipped: {error.message}")
        else:
            kept.append(policy)
    measured = measure_policies(
        session,
        kept,
        residency=asked.residency,
        ids=asked.ids,
        source=source,
        exact_fallback=options.exact_fallback,
        progress=progress,
    )
    return measured, skipped


def _rows(
    measured: Mapping[MissChoice, Measured], asked: _Asked, options: EvaluateOptions
) -> dict[MissChoice, PolicyRow]:
    sparse = "" if options.sparse_experts is None else f", sparse {options.sparse_experts:g}"
    return {
        policy: policy_row(asked.names[policy] + sparse, found, asked.text, seed=options.seed)
        for policy, found in measured.items()
    }
