"""Measurement of every policy's predictions and costs on the same sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

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
from moe_tool.runtime.moe_layer import Residency
from moe_tool.runtime.quality_account import QualityAccount
from moe_tool.runtime.session import Session


@dataclass(slots=True, kw_only=True)
class _Tally:
    """[N, P] arrays of one policy, filled batch by batch."""

    kl: np.ndarray
    agrees: np.ndarray
    nll: np.ndarray
    kl_source: np.ndarray
    costs: TokenCosts

    @classmethod
    def zeros(cls, shape: tuple[int, int]) -> Self:
        """Return an empty tally."""
        kl, nll, kl_source = (np.zeros(shape) for _ in range(3))
        agrees = np.zeros(shape, dtype=bool)
        costs = TokenCosts.zeros(shape)
        return cls(kl=kl, agrees=agrees, nll=nll, kl_source=kl_source, costs=costs)


@dataclass(slots=True, kw_only=True)
class _Base:
    """[N, P] arrays of the references of all policies, filled batch by batch."""

    nll_exact: np.ndarray
    kl_source_exact: np.ndarray | None
    nll_source: np.ndarray | None

    @classmethod
    def zeros(cls, shape: tuple[int, int], *, has_source: bool) -> Self:
        """Return empty arrays; None for the checkpoint's without a reference."""
        source = [np.zeros(shape) if has_source else None for _ in range(2)]
        return cls(nll_exact=np.zeros(shape), kl_source_exact=source[0], nll_source=source[1])

    def fill(
        self, rows: slice, batch: torch.Tensor, exact: torch.Tensor, truth: torch.Tensor | None
    ) -> None:
        """Score the exact predictions of a batch, and the checkpoint's.

        Args:
            rows: the batch's place among all sequences.
            batch: [B, S] int64.
            exact: [B, S, V] logits.
            truth: [B, S, V] logits of the checkpoint.
        """
        scored = slice(N_PROMPT_TOKENS, batch.shape[1] - 1)
        for at, ids in enumerate(batch):
            row, targets = rows.start + at, ids[scored.start + 1 : scored.stop + 1]
            ours = exact[at, scored]
            self.nll_exact[row] = negative_log_likelihood(ours, targets)
            if truth is not None and self.nll_source is not None:
                assert self.kl_source_exact is not None
                theirs = truth[at, scored]
                self.nll_source[row] = negative_log_likelihood(theirs, targets)
                self.kl_source_exact[row] = compare_logits(theirs, ours).kl


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

    Args:
        session: an open session, whose workload sets the batch.
        policies: policies that the bundle can run.
        residency: the residency of all policies.
        ids: [N, S] int64.
        source: the checkpoint; None without a reference.
        exact_fallback: whether a calibrated policy answers exactly when it would exceed its limit.
        progress: listener.
    """
    n_sequences, seq_len = ids.shape
    shape = (n_sequences, n_scored(seq_len))
    base = _Base.zeros(shape, has_source=source is not None)
    tallies = {policy: _Tally.zeros(shape) for policy in policies}
    progress.begin("evaluate", n_sequences * len(policies), "sequences")
    for first in range(0, n_sequences, session.plan.workload.batch):
        rows = slice(first, min(first + session.plan.workload.batch, n_sequences))
        exact = exact_logits(session, ids[rows])  # [B, S, V]
        truth = None
        if source is not None:
            truth = torch.empty_like(exact)
            for row in range(len(exact)):
                truth[row] = source.logits(first + row)
        base.fill(rows, ids[rows], exact, truth)
        for policy in policies:
            session.use_policy(policy, residency=residency)
            if not exact_fallback:
                session.runner.account = QualityAccount()
            if residency == "cache":
                session.empty_cache()
            _run_policy(session, tallies[policy], rows, ids[rows], exact, truth)
            progress.advance(len(exact))
        del exact, truth
    progress.end()
    is_sparse = session.runner.sparsity is not None
    return {
        policy: _measured(tally, base, is_exact=policy == EXACT_POLICY and not is_sparse)
        for policy, tally in tallies.items()
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


def _measured(tally: _Tally, base: _Base, *, is_exact: bool) -> Measured:
    """Return a policy's measurements; for exact, KL is 0 by definition, since wide and narrow
    forwards differ by rounding only."""
    kl_source = base.kl_source_exact if is_exact else tally.kl_source
    return Measured(
        kl=np.zeros_like(tally.kl) if is_exact else tally.kl,
        agrees=np.ones_like(tally.agrees) if is_exact else tally.agrees,
        nll=base.nll_exact if is_exact else tally.nll,
        nll_exact=base.nll_exact,
        kl_source=None if base.nll_source is None else kl_source,
        kl_source_exact=base.kl_source_exact,
        nll_source=base.nll_source,
        costs=tally.costs,
    )
