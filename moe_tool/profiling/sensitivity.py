"""How much an error of one layer's output costs at the end: KL added per unit of squared relative
error.

A few sequences are carried through the model beside the others, once untouched and once per MoE
layer with that layer's expert output disturbed by noise of a known size. The KL between the two
outputs, divided by the squared relative size of the noise, converts a price (relative error of a
layer's output) into nats; for small errors KL is quadratic in the error.
"""

import torch

RELATIVE_NOISE = 0.1
"""Size of the disturbance relative to each token's expert output: small enough to be quadratic,
large enough for float32."""


def disturb(output: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Return the output plus noise of RELATIVE_NOISE times each token's norm, in a random
    direction.

    Args:
        output: [T, H] float32, the sum of a MoE layer's routed experts.
        generator: seeded by the caller.
    """
    noise = torch.randn(output.shape, generator=generator)
    size: torch.Tensor = (
        RELATIVE_NOISE * output.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    )
    disturbed: torch.Tensor = output + noise * size
    return disturbed


def sensitivity(divergence: float) -> float:
    """Return KL in nats per unit of squared relative error, from the divergence that RELATIVE_NOISE
    caused."""
    return max(divergence, 0.0) / RELATIVE_NOISE**2
