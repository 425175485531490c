"""Measurement of every policy's predictions and costs on the same sequences."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from moe_tool.evaluation.divergence import compare_logits, negative_log_likelihood
from moe_tool.evaluation.figures import Measured
from moe_tool.evaluation.source_model import SourceModel
from moe_tool.evaluation.stepwise import (
    N_PROMPT_TOKENS,
    TokenCosts,
    exact_logits,
    n_scored,
    run_stepwise,
)
from moe_tool.policies.misses import EXACT_POLICY, MissChoice
from moe_tool.progress import Progress
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.session import Session


def measure_policies(
    session: Session,
    policies: Sequence[MissChoice],
    *,
    residency: Residency,
    ids: torch.Tensor,
    source: SourceModel | None,
    exact_fallback: bool,
    progress: Progress,
) -> dict[MissChoice, Measured]:
    """Run every policy on every batch, keeping exact predictions of one batch at a time.

    Exact predictions are made with float32 activations, whatever the session's.

    Args:
        session: an open session, whose workload sets the batch.
        policies: policies that the bundle can run.
        ids: [N, S] int64.
        source: the checkpoint; None without a reference.
        exact_fallback: whether a calibrated policy answers exactly when it would exceed its limit.
    """
    n_sequences = len(ids)
    exact = _exact((n_sequences, n_scored(ids.shape[1])), has_source=source is not None)
    activations = session.plan.options.activations
    is_exact = session.runner.sparsity is None and activations == "float32"
    found = {
        policy: exact if policy == EXACT_POLICY and is_exact else _another(exact)
        for policy in policies
    }
    progress.begin("evaluate", n_sequences * len(policies), "sequences")
    for first in range(0, n_sequences, session.plan.workload.batch):
        rows = slice(first, min(first + session.plan.workload.batch, n_sequences))
        if activations != "float32":
            session.use_activations("float32")
        wide = exact_logits(session, ids[rows])  # [B, S, V]
        if activations != "float32":
            session.use_activations(activations)
        truth = None
        if source is not None:
            truth = torch.empty_like(wide)
            for row in range(len(wide)):
                truth[row] = source.logits(first + row)
        _fill_exact(exact, rows, ids[rows], wide, truth)
        for policy, measured in found.items():
            session.use_policy(policy, residency=residency)
            if not exact_fallback:
                session.keep_promise(is_kept=False)
            if residency == "cache":
                session.empty_cache()
            # What a sequence teaches of its losses is for that sequence alone.
            step = len(wide) if session.learner.shadow is None else 1
            for at in range(0, len(wide), step):
                part = slice(at, at + step)
                here = slice(rows.start + at, min(rows.start + at + step, rows.stop))
                known = None if truth is None else truth[part]
                _run_policy(session, measured, here, ids[here], wide[part], known)
            progress.advance(len(wide))
        del wide, truth
    progress.end()
    return found


def _exact(shape: tuple[int, int], *, has_source: bool) -> Measured:
    """Return measurements of exact to fill in; KL is 0 by definition, since wide and narrow
    forwards differ by rounding only."""
    nll = np.zeros(shape)
    kl_source, nll_source = (np.zeros(shape) if has_source else None for _ in range(2))
    return Measured(
        kl=np.zeros(shape),
        agrees=np.ones(shape, dtype=bool),
        nll=nll,
        nll_exact=nll,
        kl_source=kl_source,
        kl_source_exact=kl_source,
        nll_source=nll_source,
        costs=TokenCosts.zeros(shape),
    )


def _another(exact: Measured) -> Measured:
    """Return measurements of another policy on the same text to fill in."""
    return replace(
        exact,
        kl=np.zeros_like(exact.kl),
        agrees=np.zeros_like(exact.agrees),
        nll=np.zeros_like(exact.nll),
        kl_source=None if exact.kl_source is None else np.zeros_like(exact.kl_source),
        costs=TokenCosts.zeros(exact.kl.shape),
    )


def _fill_exact(
    exact: Measured,
    rows: slice,
    batch: torch.Tensor,
    wide: torch.Tensor,
    truth: torch.Tensor | None,
) -> None:
    """Score the exact predictions of a batch, and the checkpoint's.

    Args:
        rows: the batch's place among all sequences.
        batch: [B, S] int64.
        wide: [B, S, V] logits.
        truth: [B, S, V] logits of the checkpoint.
    """
    scored = slice(N_PROMPT_TOKENS, batch.shape[1] - 1)
    for at, ids in enumerate(batch):
        row, targets = rows.start + at, ids[scored.start + 1 : scored.stop + 1]
        ours = wide[at, scored]
        exact.nll[row] = negative_log_likelihood(ours, targets)
        if truth is not None:
            assert exact.nll_source is not None and exact.kl_source is not None
            theirs = truth[at, scored]
            exact.nll_source[row] = negative_log_likelihood(theirs, targets)
            exact.kl_source[row] = compare_logits(theirs, ours).kl


def _run_policy(
    session: Session,
    measured: Measured,
    rows: slice,
    batch: torch.Tensor,
    wide: torch.Tensor,
    truth: torch.Tensor | None,
) -> None:
    """Run a batch under the session's policy; predictions of exact are known already."""

    def visit(position: int, logits: torch.Tensor) -> None:
        if measured.nll is measured.nll_exact:
            return
        column = position - N_PROMPT_TOKENS
        judged = compare_logits(wide[:, position], logits)
        measured.kl[rows, column] = judged.kl
        measured.agrees[rows, column] = judged.agrees
        measured.nll[rows, column] = negative_log_likelihood(logits, batch[:, position + 1])
        if truth is not None and measured.kl_source is not None:
            measured.kl_source[rows, column] = compare_logits(truth[:, position], logits).kl

    costs = run_stepwise(session, batch, visit)
    for name in TokenCosts.__dataclass_fields__:
        getattr(measured.costs, name)[rows] = getattr(costs, name)
