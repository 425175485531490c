"""Norms of routing that are small enough to score by hand."""

import json
from typing import Any

from moe_tool.artifacts.routing_norm import RoutingNorm


def norm_body(**changed: Any) -> dict[str, Any]:
    """Two layers with two watched logits in all, around 0 for one domain and (4, 0) for another."""
    body: dict[str, Any] = {
        "domains": ["wiki", "code"],
        "layers": [
            {"layer": 1, "experts": [0], "scale": [2.0], "means": [[0.0], [4.0]],
             "directions": [[1.0]]},
            {"layer": 3, "experts": [2], "scale": [1.0], "means": [[0.0], [0.0]],
             "directions": [[0.0]]},
        ],
        "spread": [4.0],
        "rest": 0.5,
        "thresholds": [3.0, 2.0],
        "fitted_windows": 200,
        "held_out_windows": 50,
        "held_out_alarms": 0,
    }  # fmt: skip
    return body | changed


def make_norm(**changed: Any) -> RoutingNorm:
    """Return the norm of `norm_body`."""
    return RoutingNorm.model_validate_json(json.dumps(norm_body(**changed)))
