"""Prefetch policies: the choice of experts to read before their layer is called."""

from moe_tool.policies.prefetch.next_layer import fetch_predicted
from moe_tool.policies.prefetch.protocol import ChoosePrefetch

PREFETCH: dict[str, ChoosePrefetch | None] = {"none": None, "next-layer": fetch_predicted}
"""Every way to choose by the name that `--prefetch` takes; None reads nothing before it is wanted.

All of them are given what the next MoE layer's router says of this layer's hidden states.
"""

__all__ = ["PREFETCH", "ChoosePrefetch", "fetch_predicted"]
