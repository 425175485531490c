"""Inputs without which a miss policy cannot be made, each with its refusal."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_tool.errors import MoeToolError, NotFoundError, UnsupportedModelError, UsageError
from moe_tool.policies.misses.protocol import PolicyInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One kind of input that a policy requires."""

    is_met: Callable[[PolicyInputs], bool]
    complaint: str
    """Complaint that follows the policy's name if the need is not met"""
    hint: str
    error: type[MoeToolError] = UsageError

    def require(self, policy: str, inputs: PolicyInputs) -> None:
        """Refuse inputs that do not meet the need, by its error."""
        if not self.is_met(inputs):
            raise self.error(f"--policy {policy}: {self.complaint}", hint=self.hint)


BUDDIES = Need(
    is_met=lambda inputs: inputs.buddies is not None,
    complaint="this bundle has no buddies",
    hint="pack it again with --buddies FILE",
)
GATES = Need(
    is_met=lambda inputs: inputs.gates is not None,
    complaint="this bundle has no buddies, so the gates' thresholds are not known",
    hint="pack it again with --buddies FILE, or add --no-gates",
)
PRICES = Need(
    is_met=lambda inputs: inputs.prices is not None,
    complaint="this bundle was packed without a profile, so it has no prices",
    hint="pack it again with --profile FILE",
)
RATIO_QUANTILES = Need(
    is_met=lambda inputs: bool(inputs.ratios),
    complaint="this bundle was packed without a profile",
    hint="pack it again with --profile FILE",
)
WEIGHT_RULE = Need(
    is_met=lambda inputs: inputs.reweigh is not None,
    complaint="the rule for this model's gate weights is not known",
    hint="take --policy buddy, random, drop or exact",
)
REPLICAS = Need(
    is_met=lambda inputs: len(inputs.forms) > 1,
    complaint="this bundle has no replicas",
    hint="pack it again with --replicas 2",
)
MASK_ROUTER = Need(
    is_met=lambda inputs: inputs.pruning is not None,
    complaint="this bundle has no trained mask routers",
    hint="train it first: moe-tool tune pruning BUNDLE --data ...",
    error=NotFoundError,
)
SEVERAL_EXPERTS = Need(
    is_met=lambda inputs: inputs.top_k > 1,
    complaint="this model has one expert per token, so none can be left out",
    hint="take --policy exact",
    error=UnsupportedModelError,
)
