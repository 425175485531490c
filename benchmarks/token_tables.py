"""Tables of mean vectors per token id: weighted sums, shrunk towards their mean, of any rank."""

import torch


class TokenSums:
    """Weighted sums of vectors [d] by token id."""

    def __init__(self, vocabulary: int, width: int) -> None:
        self._sums = torch.zeros(vocabulary, width, dtype=torch.float64)
        self._weights = torch.zeros(vocabulary, dtype=torch.float64)
        self._n = 0
        self._energy = 0.0

    def add(self, ids: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> None:
        """Add vectors [n, d] of token ids [n] with weights [n]."""
        values, weights = values.double(), weights.double()
        self._sums.index_add_(0, ids, values * weights[:, None])
        self._weights.index_add_(0, ids, weights)
        self._energy += float((values.square().sum(1) * weights).sum())
        self._n += len(ids)

    def rows(self, rank: int | None) -> torch.Tensor:
        """Return the table [V, d], each row as far from the mean as its weight bears out.

        A row is (W m + c mu) / (W + c) with c the ratio of the variance within a token to that
        between tokens, from the sums of squares of a one-way random model. Of a rank r, the
        deviations from mu are then projected on their r leading directions, weighted by W.
        """
        unit = self._weights / max(1e-30, float(self._weights.sum()) / max(1, self._n))
        mean = self._sums.sum(0) / self._weights.sum().clamp_min(1e-30)
        seen = self._weights > 0
        away = torch.zeros_like(self._sums)
        away[seen] = self._sums[seen] / self._weights[seen, None] - mean
        prior = self._prior(unit, away, mean)
        away *= (unit / (unit + prior))[:, None]
        if rank is not None:
            _, directions = torch.linalg.eigh(away.T @ (away * unit[:, None]))
            kept = directions[:, -rank:]
            away = away @ kept @ kept.T
        return (mean + away).float()

    def _prior(self, unit: torch.Tensor, away: torch.Tensor, mean: torch.Tensor) -> float:
        """Return the weight of the mean, in tokens of mean weight."""
        n, n_ids = float(self._n), int((unit > 0).sum())
        scale = float(unit.sum() / self._weights.sum())
        between = float((away.square().sum(1) * unit).sum())
        total = self._energy * scale - n * float(mean.square().sum())
        within = (total - between) / max(1.0, n - n_ids)
        spread = (between - (n_ids - 1) * within) / max(1.0, n - float(unit.square().sum()) / n)
        return within / max(spread, 1e-9 * within + 1e-30)


def table_bytes(vocabulary: int, width: int, rank: int | None) -> int:
    """Return the size of a table in float16: of a rank, coefficients, directions and a mean."""
    return 2 * (vocabulary * width if rank is None else (vocabulary + width) * rank + width)
