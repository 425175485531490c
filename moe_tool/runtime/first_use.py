"""Memory that torch takes when it first computes, taken before the process is measured."""

import torch
from torch.nn import functional

_LEAST_BYTES = 9 * 2**18
"""Room for what a model's own first forward still takes: 0.2 to 2.1 MiB of models of 4 to 6
layers"""
_SKELETON_SHARE = 1 / 256


def use_torch_once() -> None:
    """Compute what every model computes, on tensors of a few KiB.

    Matrix libraries, thread pools and caches of primitives take 5 MiB or more at their first use
    and nothing at later ones. A refusal that measures the process after this knows the least
    budget without having loaded a model.
    """
    with torch.inference_mode():
        hidden, weight = torch.ones(2, 1, 64), torch.ones(64, 64)
        functional.linear(hidden, weight)
        heads = torch.ones(1, 2, 2, 16)
        functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        functional.silu(hidden)
        torch.topk(functional.softmax(hidden, -1), 2)
        hidden.pow(2).mean(-1, keepdim=True).rsqrt()
        hidden.cos(), hidden.sin()
        functional.embedding(torch.zeros(1, 2, dtype=torch.int64), weight)


def first_use_bytes(skeleton_bytes: int) -> int:
    """Return the reserve for a model's own first forward after `use_torch_once`, in bytes.

    Args:
        skeleton_bytes: size of the loaded skeleton, with which it grows.
    """
    return _LEAST_BYTES + int(skeleton_bytes * _SKELETON_SHARE)
