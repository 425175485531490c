"""Learner of the loss of a running text, token by token, which prices and reads follow."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_tool.runtime.live_prices import LivePrices, ReadWorth
from moe_tool.runtime.moe_layer import MoeLayerRunner
from moe_tool.runtime.policy_choice import ChosenPolicy
from moe_tool.runtime.shadow import Shadow


@dataclass(slots=True, kw_only=True)
class TextLearner:
    """Learning of one session under one policy, begun anew with every sequence."""

    runner: MoeLayerRunner
    shadow: Shadow | None
    """Tokens whose loss is measured; None: none"""
    _is_exact: bool = False  # the last token was, whatever the policy

    def begin_sequences(self, count: int) -> None:
        """Begin new sequences, and forget the text before."""
        self.runner.account.begin_sequences(count)
        for learner in (self.runner.live, self.runner.worth, self.shadow):
            if learner is not None:
                learner.begin_sequence()
        self._is_exact = True  # no token yet whose loss could be settled

    def begin_token(self, model: Any, kwargs: dict[str, Any]) -> np.ndarray:
        """Return the sequences whose next token is to be exact, [B] bool.

        A token whose loss is measured is answered by the policy first, and then exact.

        Args:
            model: the session's model, whose forward with `kwargs` is to come.
        """
        runner = self.runner
        exact = runner.account.begin_token()
        if runner.worth is not None and not self._is_exact:
            runner.worth.settle(runner.account.last_token)
        is_drifting = runner.watch is not None and runner.watch.is_drifting
        cache = kwargs.get("past_key_values")
        if self.shadow is not None and self.shadow.is_due(cache, is_drifting=is_drifting):
            self._measure(self.shadow, model, kwargs)
            exact = np.ones(len(exact), dtype=bool)
        self._is_exact = bool(exact.any())
        return exact

    def _measure(self, shadow: Shadow, model: Any, kwargs: dict[str, Any]) -> None:
        runner = self.runner
        runner.is_probe, runner.probed = True, 0.0
        if runner.live is not None:
            runner.live.begin_token()
        try:
            shadow.run_lossily(model, kwargs)
        finally:
            runner.is_probe = False

    def end_token(self, logits: torch.Tensor) -> None:
        """Learn from a forward's last logits, [B, V], if its loss is measured."""
        divergence = None if self.shadow is None else self.shadow.compare(logits)
        if divergence is None:
            return
        runner, tokens = self.runner, len(logits)
        runner.account.judge(divergence, expected=runner.probed, tokens=tokens)
        if runner.live is not None:
            runner.live.observe(divergence, tokens=tokens)


def learn_of_text(
    runner: MoeLayerRunner, policy: ChosenPolicy, *, layers: tuple[int, ...], every: int | None
) -> TextLearner:
    """Return the learner of a policy, and let its runner use what it learns.

    Args:
        runner: its account is open.
        layers: decoder layers with experts.
        every: as RunOptions.shadow.
    """
    target, prices = policy.policy.target_kl, policy.prices
    runner.worth = runner.live = None
    if not math.isinf(target):
        runner.worth = ReadWorth(policy.policy.nats_per_mb, target)
    keeps_loss = runner.account.limit is not None or runner.worth is not None
    is_measured = policy.is_lossy and (keeps_loss if every is None else every > 0)
    if is_measured and prices is not None:
        n_forms = len(next(iter(prices.layers.values())).eps)
        runner.live = LivePrices(layers, 1 + n_forms)
    return TextLearner(runner=runner, shadow=Shadow(every=every) if is_measured else None)
