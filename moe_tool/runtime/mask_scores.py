"""Scores of a mask router for a token's experts, for training and running alike."""

from dataclasses import dataclass

import torch

from moe_tool.artifacts.mask_router import MASK_ROUTER_PARTS, LayerMaskRouter, MaskRouter

_LEAST_WEIGHT = 1e-6
"""Lower bound of gate weights, whose logarithm is taken"""
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskTensors:
    """Tensors of a `LayerMaskRouter`."""

    by_hidden: torch.Tensor
    by_weight: torch.Tensor
    by_expert: torch.Tensor
    bias: torch.Tensor

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in MASK_ROUTER_PARTS}

    def frozen(self) -> "MaskTensors":
        """Return views without a gradient."""
        return MaskTensors(**{name: part.detach() for name, part in self.parts.items()})

    def to_arrays(self) -> LayerMaskRouter:
        """Return the arrays that a file holds."""
        return LayerMaskRouter(**{name: p.detach().numpy() for name, p in self.parts.items()})


def mask_tensors(router: MaskRouter) -> dict[int, MaskTensors]:
    """Return views of the routers by decoder layer."""
    return {
        layer: MaskTensors(
            **{name: torch.from_numpy(getattr(each, name)) for name in MASK_ROUTER_PARTS}
        )
        for layer, each in router.items()
    }


def slot_order(weight: torch.Tensor) -> torch.Tensor:
    """Return each token's slots by falling gate weight, equal ones in order, [T, K] int64."""
    return torch.argsort(weight, dim=1, descending=True, stable=True)


def slot_worth(
    router: MaskTensors, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return the slot scores of all slots but the heaviest, [T, K-1] by rank of gate weight: what
    each adds to the logit of a keep-pattern.

    Args:
        hidden: [T, H] float32, inputs of the layer's experts.
        index: [T, K] int64; an entry of E or more means no expert.
        weight: [T, K] gate weights.
    """
    order = slot_order(weight)
    ranked = weight.gather(1, order).float()  # [T, K]
    expert = index.gather(1, order)[:, 1:].clamp(max=router.by_expert.shape[1] - 1)  # [T, K-1]
    scaled = hidden * torch.rsqrt(hidden.square().mean(dim=1, keepdim=True) + _LEAST_SQUARE)
    about = torch.cat([ranked.clamp(min=_LEAST_WEIGHT).log(), ranked], dim=1)  # [T, 2K]
    worth = scaled @ router.by_hidden.T + about @ router.by_weight.T + router.bias
    return worth + router.by_expert.T.gather(0, expert)
