"""Training of mask routers by distillation from the session with every expert running."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from moe_tool.artifacts.mask_router import MASK_ROUTER_PARTS, mask_router_shapes
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.misses.prune_learned import rate_offsets
from moe_tool.runtime.mask_scores import MaskTensors, slot_worth
from moe_tool.tuning.keep_patterns import draw_mask, hard_mask
from moe_tool.tuning.masked_experts import ChooseMask, MaskedExperts

_LEARNING_RATE = 0.03
_LAST_LEARNING_RATE = 0.02
"""Learning rate of the last step as a share of the first one's"""
_TYPICAL_HIDDEN = 256
"""Hidden width that the learning rate was tuned for; wider models get proportionally less, since a
step moves a sum of H products by up to H times the rate"""
_TAU = (2.0, 0.25)
"""Temperature of the first and the last step, falling geometrically"""
_GAIN = 0.2
"""Adaptation rate of the penalty: it grows by exp(gain * (wanted - skipped share)) per step"""
_PENALTY_RANGE = (1e-9, 1e3)

_Parameters = Mapping[int, MaskTensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Target and data of a training."""

    share: float
    """Share of the slots after the heaviest to skip, 0 to 1"""
    ids: torch.Tensor
    """[N, S] int64 token ids"""
    batch: int
    """Sequences per step"""
    seed: int

    @property
    def n_steps(self) -> int:
        """Number of steps; each sequence is seen once."""
        return -(-len(self.ids) // self.batch)


class MaskTraining:
    """State of a training: parameters, Adam's moments, the penalty."""

    def __init__(self, shape: MoeShape, plan: TrainingPlan) -> None:
        """Initialise the routers so that the ratio of gate weights alone decides."""
        self.plan = plan
        self.step = 0
        self.penalty: float | None = None
        """Nats for keeping all slots after the heaviest; None before the first step"""
        self.routers: _Parameters = {layer: _ratio_router(shape) for layer in shape.layers}
        self._n_slots = sum(router.bias.numel() for router in self.routers.values())
        self._optimizer = torch.optim.Adam(
            [
                {
                    "params": [getattr(router, part) for router in self.routers.values()],
                    "lr": _rate_of(part, shape),
                }
                for part in MASK_ROUTER_PARTS
            ]
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    @property
    def penalty_per_slot(self) -> float:
        """Nats per kept slot after the heaviest."""
        return 0.0 if self.penalty is None else self.penalty / self._n_slots

    def begin(self, experts: MaskedExperts, *, micro_batch: int) -> None:
        """Set the biases so that the untrained routers skip the wanted share."""
        every = np.concatenate(
            [
                worth
                for part in torch.split(self._batch(0), micro_batch)
                for worth in watch_worth(experts, self.routers, part).values()
            ]
        )
        offset = float(rate_offsets(every, np.array([self.plan.share]))[0])
        with torch.no_grad():
            for router in self.routers.values():
                router.bias.sub_(offset)

    def advance(self, experts: MaskedExperts, *, micro_batch: int) -> None:
        """Learn from the next batch.

        Args:
            micro_batch: sequences per forward.
        """
        plan, ids = self.plan, self._batch(self.step)
        progress = self.step / plan.n_steps
        tau = _TAU[0] * (_TAU[1] / _TAU[0]) ** progress
        decay = 1 - (1 - _LAST_LEARNING_RATE) * progress
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * decay
        n_scored = ids.shape[0] * (ids.shape[1] - 1)
        noise = self._noise(ids)
        totals = np.zeros(2)
        penalty = 0.0 if self.penalty is None else self.penalty
        self._optimizer.zero_grad()
        for first in range(0, len(ids), micro_batch):
            rows = slice(first, first + micro_batch)
            drawn = _Drawn(self.routers, noise, rows, ids.shape[1], tau)
            with torch.no_grad():
                exact = experts.logits(ids[rows])
            kl = _total_kl(exact, experts.logits(ids[rows], mask=drawn.mask))
            loss = kl + penalty * drawn.kept() / self._n_slots
            (loss / n_scored).backward()  # type: ignore[no-untyped-call]
            totals += float(kl.detach()), drawn.n_left_out
        kl_per_token = totals[0] / n_scored
        left_out = totals[1] / (n_scored * self._n_slots)
        if self.penalty is None:
            # KL is about quadratic in the skipped share: this is its slope there.
            self.penalty = kl_per_token / (2 * max(left_out, 1 / 64))
        else:
            self._optimizer.step()
        self.penalty *= float(np.exp(_GAIN * (plan.share - left_out)))
        self.penalty = float(np.clip(self.penalty, *_PENALTY_RANGE))
        self.step += 1

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a resume needs, by name."""
        found = {}
        for layer, router in self.routers.items():
            for part, parameter in router.parts.items():
                kept = self._optimizer.state.get(parameter, {})
                name = f"layer.{layer}.{part}"
                found[name] = parameter.detach()
                for moment in ("exp_avg", "exp_avg_sq"):
                    found[f"{name}.{moment}"] = kept.get(moment, torch.zeros_like(parameter))
        return found

    def restore(self, state: dict[str, torch.Tensor], *, step: int, penalty: float) -> None:
        """Continue from a saved state."""
        self.step, self.penalty = step, penalty
        for layer, router in self.routers.items():
            for part, parameter in router.parts.items():
                name = f"layer.{layer}.{part}"
                with torch.no_grad():
                    parameter.copy_(state[name])
                if step > 1:  # the first step only finds the penalty
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(step - 1)),
                        "exp_avg": state[f"{name}.exp_avg"].clone(),
                        "exp_avg_sq": state[f"{name}.exp_avg_sq"].clone(),
                    }

    def _batch(self, step: int) -> torch.Tensor:
        order = torch.randperm(len(self.plan.ids), generator=self._generator(0))
        rows = order[step * self.plan.batch : (step + 1) * self.plan.batch]
        return self.plan.ids[rows]

    def _noise(self, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the noise of a step, [B, S, K] by layer, independent of the micro-batches."""
        generator = self._generator(1 + self.step)
        return {
            layer: torch.rand(*ids.shape, len(router.bias) + 1, generator=generator)
            for layer, router in self.routers.items()
        }

    def _generator(self, stream: int) -> torch.Generator:
        seed = int(np.random.SeedSequence([self.plan.seed, stream]).generate_state(1)[0])
        return torch.Generator().manual_seed(seed)


class _Drawn:
    """Drawn masks of one forward, with counts of kept and skipped slots."""

    def __init__(
        self,
        routers: _Parameters,
        noise: dict[int, torch.Tensor],
        rows: slice,
        seq_len: int,
        tau: float,
    ) -> None:
        self._routers, self._tau, self._seq_len = routers, tau, seq_len
        self._noise = {layer: each[rows].flatten(0, 1) for layer, each in noise.items()}
        self._kept: list[torch.Tensor] = []
        self.n_left_out = 0.0

    def mask(self, call: LayerCall) -> torch.Tensor:
        worth = slot_worth(
            self._routers[call.layer], call.hidden.detach(), call.index, call.weight.detach()
        )
        mask = draw_mask(worth, self._noise[call.layer], tau=self._tau)
        scored = ~is_prompt(len(worth), self._seq_len)
        self._kept.append(mask[scored, 1:].sum())
        self.n_left_out += float((1 - hard_mask(worth.detach())[scored, 1:]).sum())
        return torch.where(scored[:, None], mask, 1.0)

    def kept(self) -> torch.Tensor:
        return torch.stack(self._kept).sum()


def is_prompt(n_tokens: int, seq_len: int) -> torch.Tensor:
    """Return [T] bool: True for the first token of a sequence, which is exact and not scored."""
    return torch.arange(n_tokens) % seq_len == 0


def watch_worth(
    experts: MaskedExperts, routers: _Parameters, ids: torch.Tensor
) -> dict[int, np.ndarray]:
    """Return the routers' slot scores with every expert running, [T, K-1] by layer, no prompts.

    Args:
        ids: [B, S] int64 token ids.
    """
    found: dict[int, np.ndarray] = {}

    def watch(call: LayerCall) -> None:
        worth = slot_worth(routers[call.layer], call.hidden, call.index, call.weight)
        found[call.layer] = worth[~is_prompt(len(worth), ids.shape[1])].numpy()

    experts.watch = watch
    try:
        with torch.no_grad():
            experts.logits(ids)
    finally:
        experts.watch = None
    return found


def router_mask(routers: _Parameters, offset: Callable[[int], float], seq_len: int) -> ChooseMask:
    """Return the mask function of routers without noise; it keeps all experts for prompts.

    Args:
        offset: layer -> threshold of the slot scores.
        seq_len: S.
    """

    def mask(call: LayerCall) -> torch.Tensor:
        worth = slot_worth(routers[call.layer], call.hidden, call.index, call.weight)
        kept = hard_mask(worth, offset=offset(call.layer))
        return torch.where(is_prompt(len(worth), seq_len)[:, None], 1.0, kept)

    return mask


def ratio_routers(shape: MoeShape) -> _Parameters:
    """Return routers that score log(gate weight / largest gate weight): with a threshold per layer
    they are MC's rule for two experts."""
    return {layer: _ratio_router(shape).frozen() for layer in shape.layers}


def _ratio_router(shape: MoeShape) -> MaskTensors:
    parts = {name: torch.zeros(extents) for name, extents in mask_router_shapes(shape).items()}
    for row in range(shape.top_k - 1):
        parts["by_weight"][row, row + 1] = 1.0
        parts["by_weight"][row, 0] = -1.0
    return MaskTensors(**{name: part.requires_grad_() for name, part in parts.items()})


def _rate_of(part: str, shape: MoeShape) -> float:
    if part != "by_hidden":
        return _LEARNING_RATE
    return _LEARNING_RATE * min(1.0, _TYPICAL_HIDDEN / shape.hidden)


def _total_kl(exact: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the sum of KL(exact || found) over all predictions but the prompt's, in nats."""
    return F.kl_div(
        torch.log_softmax(found[:, 1:], dim=-1),
        torch.log_softmax(exact[:, 1:], dim=-1),
        reduction="sum",
        log_target=True,
    )
