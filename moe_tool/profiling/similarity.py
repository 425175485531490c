"""Similarity of the experts of one layer by several measures, each [E, E]."""

import numpy as np
import torch

_CHUNK_TOKENS = 8192


def token_grams(outputs: torch.Tensor) -> torch.Tensor:
    """Return the inner products of all experts' outputs, [E, n, H], by token, [n, E, E] float32."""
    by_token = outputs.transpose(0, 1)  # [n, E, H]
    return torch.bmm(by_token, by_token.transpose(1, 2))


def token_cosines(grams: torch.Tensor) -> torch.Tensor:
    """Return each token's cosines, [n, E, E], from its inner products; 0 with a zero output."""
    norms = grams.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()  # [n, E]
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return (grams * inverse[:, :, None] * inverse[:, None, :]).clamp(-1.0, 1.0)


def linear_cka(outputs: torch.Tensor) -> np.ndarray:
    """Return the linear CKA of the experts' centred outputs, [E, E] float32 in 0..1.

    CKA(i, j) = <K_i, K_j> / (||K_i|| ||K_j||) over the n x n kernels K_i = Yc_i Yc_i^T of outputs
    centred over tokens; the equal form ||Yc_i^T Yc_j||^2 would cost H^2 for every pair of experts.
    A constant output is similar to itself only. With fewer tokens than H all values are biased
    upward: they rank experts, but are no shares.

    Source: Kornblith et al., arXiv:1905.00414, section 3.

    Args:
        outputs: [E, n, H] float32, not changed. Takes [E, n, n] and one [n, H] of memory.
    """
    n_experts, n_tokens, _ = outputs.shape
    kernels = torch.empty(n_experts, n_tokens, n_tokens)
    for expert_id in range(n_experts):
        centred = outputs[expert_id] - outputs[expert_id].mean(dim=0)
        # The mean in float32 leaves a residue of rounding on a constant output.
        noise = 1e-6 * outputs[expert_id].abs().max() if n_tokens else 0.0
        centred = torch.where(centred.abs() > noise, centred, 0.0)
        size = centred.norm()
        if size > 0:
            centred = centred / size  # keeps the product below in the range of float32
        torch.mm(centred, centred.T, out=kernels[expert_id])
    flat = kernels.view(n_experts, -1)
    return _normalised((flat @ flat.T).double().numpy())


def router_similarity(logits: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation between experts' router logits, [E, E] float32.

    A constant column has correlation 0 with others and 1 with itself.

    Args:
        logits: [T, E] float16 or float32, finite.
    """
    n_tokens, n_experts = logits.shape
    if n_tokens == 0:
        return np.eye(n_experts, dtype=np.float32)
    mean = logits.mean(axis=0, dtype=np.float64)
    varies = logits.max(axis=0) > logits.min(axis=0)  # [E]
    covariance = np.zeros((n_experts, n_experts))
    for first in range(0, n_tokens, _CHUNK_TOKENS):
        centred = (logits[first : first + _CHUNK_TOKENS] - mean).astype(np.float32)
        covariance += centred.T @ centred
    return _normalised(covariance * np.outer(varies, varies))


def coactivation(index: np.ndarray, n_experts: int) -> np.ndarray:
    """Return the number of tokens that chose both experts, [E, E] int64; the diagonal is the load.

    Args:
        index: [T, K] integers below `n_experts`, distinct in each row.
    """
    top_k = index.shape[1]
    wide = index.astype(np.int64)
    pairs = np.zeros(n_experts * n_experts, np.int64)
    for slot in range(top_k):
        for other in range(slot + 1, top_k):
            cell = wide[:, slot] * n_experts + wide[:, other]
            pairs += np.bincount(cell, minlength=n_experts * n_experts)
    one_way = pairs.reshape(n_experts, n_experts)
    counts = one_way + one_way.T
    np.fill_diagonal(counts, np.bincount(wide.reshape(-1), minlength=n_experts))
    return counts


def _normalised(products: np.ndarray) -> np.ndarray:
    """Return p[i, j] / sqrt(p[i, i] p[j, j]) with 0 for 0 / 0, and 1 on the diagonal."""
    size = np.sqrt(np.maximum(products.diagonal(), 0.0))
    inverse = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    similarity = np.clip(products * np.outer(inverse, inverse), -1.0, 1.0)
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1.0)
    result: np.ndarray = similarity.astype(np.float32)
    return result
