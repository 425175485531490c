"""Prefetch of the forms with which a miss policy would answer the predicted routing.

Source: arXiv:2411.01433, section 4.2, for the scorer of `replica`.
"""

from dataclasses import replace

import numpy as np

from moe_tool.artifacts.expert_ids import FormIds
from moe_tool.artifacts.routing import Routing
from moe_tool.policies.misses.protocol import MissPolicy
from moe_tool.policies.prefetch.protocol import Prediction


def answer_prediction(
    predicted: Prediction,
    policy: MissPolicy,
    *,
    resident: np.ndarray,
    stored: np.ndarray | None = None,
) -> Prediction:
    """Return the answers to predicted experts, by `FormIds` number; dropped slots name none.

    Args:
        policy: needs nothing of the router.
        resident: forms of the layer in memory or being read, [F, E] bool.
        stored: experts in the bundle, [E] bool; None: all.
    """
    n_experts = resident.shape[1]
    present = (predicted.index >= 0) & (predicted.index < n_experts)
    index = np.where(present, predicted.index, 0)
    if stored is not None:
        present &= stored[index]
    routing = Routing(
        layer=predicted.layer,
        index=index,
        present=present,
        weight=np.where(present, predicted.weight, 0).astype(np.float32),
        score=None,
        logits=None,
        sequence=np.zeros(len(index), dtype=np.int64),
    )
    answers = policy.decide(routing, resident)
    numbers = FormIds(n_experts).number(answers.form, answers.expert)
    return replace(predicted, index=np.where(answers.present, numbers, -1), weight=answers.weight)
