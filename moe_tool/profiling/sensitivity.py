"""How much an error of one layer's output costs at the end: KL added per unit of squared relative
error.

A few sequences are carried through the model beside the others, once untouched and once per MoE
layer with that layer's expert output disturbed by noise of a known size. The KL between the two
outputs, divided by the squared relative size of the noise, converts a price (relative error of a
layer's output) into nats; for small errors KL is quadratic in the error.
"""

import torch
import torch.nn.functional as F

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


def total_divergence(exact_logits: torch.Tensor, disturbed_logits: torch.Tensor) -> float:
    """Return the sum over tokens of KL(exact || disturbed) in nats.

    Computes in float64, one token at a time: beside the two arguments it needs a few rows of V.

    Args:
        exact_logits: [T, V] float32.
        disturbed_logits: [T, V] float32.
    """
    total = 0.0
    for exact, disturbed in zip(exact_logits, disturbed_logits, strict=True):
        p = F.log_softmax(exact.double(), dim=-1)  # [V]
        q = F.log_softmax(disturbed.double(), dim=-1)
        total += float((p.exp() * (p - q)).sum())
    return total


def sensitivity(divergence: float) -> float:
    """Return KL in nats per unit of squared relative error, from the divergence that RELATIVE_NOISE
    caused."""
    return max(divergence, 0.0) / RELATIVE_NOISE**2
