"""Refusal of predictions that are no numbers."""

import math
from pathlib import Path

import torch

from moe_tool.errors import CorruptArtifactError


def require_finite_logits(logits: torch.Tensor, folder: Path) -> None:
    """Refuse logits whose largest is not finite; -inf masks a token.

    Args:
        logits: of any shape.
        folder: the bundle.

    Raises:
        CorruptArtifactError: they are not finite.
    """
    if not math.isfinite(logits.amax().item()):  # amax propagates NaN
        raise CorruptArtifactError(
            f"the model of {folder} gives logits that are not finite, from which nothing can be "
            "predicted",
            hint=f"moe-tool inspect {folder} --verify tells whether the bundle is damaged; if it "
            "is intact, download the checkpoint again and pack it",
        )
