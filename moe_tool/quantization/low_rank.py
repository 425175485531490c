"""A linear map of low rank in an expert's place: fitted to its output on the tokens routed to it.

An expert is not linear, but over the tokens that its router sends to it the better part of its
output may be. The map is reduced-rank regression (Izenman, 1975): the least-squares map, projected
on the leading directions of its own predictions. It is the low-rank correction of a stand-in of
whom nothing else is needed, so that it answers whoever is in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

LOW_RANK_TENSORS: Mapping[str, tuple[str, ...]] = {
    "low_rank_in": ("rank", "hidden"),
    "low_rank_out": ("hidden", "rank"),
    "low_rank_offset": ("hidden",),
}
"""The tensors of a map and their extents: output = out @ (in @ x) + offset"""
_RIDGE = 1e-3
_RIDGE_OF_SHARE = 0.2
"""Times inputs / tokens; from 0.1 to 0.3 a trained model's held-out error was lowest at 170 to 690
tokens for 256 inputs. Both are relative to the mean energy of an input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFit:
    """Sums over tokens that a least-squares map follows from, H wide on both sides."""

    n_tokens: int
    mean_in: torch.Tensor
    """[H] float64"""
    mean_out: torch.Tensor
    """[H] float64"""
    covariance: torch.Tensor
    """[H, H] float64: of inputs"""
    cross: torch.Tensor
    """[H, H] float64: of inputs with outputs"""


def linear_fit(inputs: torch.Tensor, outputs: torch.Tensor) -> LinearFit:
    """Return the sums over tokens.

    Args:
        inputs: [n, H] float32.
        outputs: [n, H] float32, the expert's.
    """
    x, y = inputs.double(), outputs.double()
    n_tokens = max(1, len(x))
    mean_in, mean_out = x.sum(0) / n_tokens, y.sum(0) / n_tokens
    x, y = x - mean_in, y - mean_out
    return LinearFit(
        n_tokens=len(inputs),
        mean_in=mean_in,
        mean_out=mean_out,
        covariance=x.T @ x / n_tokens,
        cross=x.T @ y / n_tokens,
    )


def low_rank_map(fit: LinearFit, rank: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a map by name, float16.

    Without tokens the map is zero. A ridge keeps it sane where tokens are fewer than inputs; it
    shrinks as 1 / tokens.

    Args:
        fit: of one expert.
        rank: of the map; directions beyond the width are zero.
    """
    hidden = len(fit.mean_in)
    energy = float(fit.covariance.diagonal().mean())
    into, out = torch.zeros(rank, hidden), torch.zeros(hidden, rank)
    offset = fit.mean_out
    if fit.n_tokens and energy > 0:
        ridge = energy * (_RIDGE + _RIDGE_OF_SHARE * hidden / fit.n_tokens)
        damped = fit.covariance + ridge * torch.eye(hidden, dtype=torch.float64)
        full = torch.linalg.solve(damped, fit.cross)  # [H in, H out]
        # Of the predictions x @ full, the directions with most energy.
        predicted = full.T @ fit.covariance @ full
        _, vectors = torch.linalg.eigh(predicted)
        kept = vectors[:, -min(rank, hidden) :].flip(1)  # [H, r]
        # Both factors of one size, so that neither leaves float16's range.
        first = (full @ kept).T  # [r, H]
        size = first.norm(dim=1, keepdim=True).clamp_min(1e-30).sqrt()
        into[: kept.shape[1]] = (first / size).float()
        out[:, : kept.shape[1]] = (kept * size.T).float()
        offset = fit.mean_out - kept @ (first @ fit.mean_in)
    largest = torch.finfo(torch.float16).max
    parts = {"low_rank_in": into, "low_rank_out": out, "low_rank_offset": offset.float()}
    return {name: part.clamp(-largest, largest).half() for name, part in parts.items()}
