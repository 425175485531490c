"""Sensitivity of the model's output to an error in one MoE layer: KL per squared relative error.

A few sequences pass through the model once untouched and once per MoE layer with noise of a known
size added to that layer's expert output. The KL between the outputs, divided by the squared
relative size of the noise, converts relative errors of a layer's output to nats; for small errors
KL is quadratic in the error.
"""

import torch

RELATIVE_NOISE = 0.1
"""Norm of the noise relative to each token's expert output: small enough for KL to be quadratic,
large enough for float32."""


def disturb(output: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Return the output plus noise in a random direction, RELATIVE_NOISE times each token's norm.

    Args:
        output: [T, H] float32, sum of a MoE layer's routed experts.
        generator: source of the noise.
    """
    noise = torch.randn(output.shape, generator=generator)
    size: torch.Tensor = (
        RELATIVE_NOISE * output.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    )
    disturbed: torch.Tensor = output + noise * size
    return disturbed


def sensitivity(divergence: float) -> float:
    """Return KL in nats per squared relative error, from the KL that `disturb` caused."""
    return max(divergence, 0.0) / RELATIVE_NOISE**2
