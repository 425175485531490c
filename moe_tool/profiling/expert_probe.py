"""Statistics of all experts of a layer on one sample of tokens, and the price of substitutions.

All outputs at once can be larger than memory (128 experts, 1024 tokens, 4096 wide: 2 GB), so they
are fed in blocks of tokens. Nearly every statistic is a sum over tokens of inner products
<E_i(x), E_j(x)>; only these sums are kept. CKA compares tokens with tokens and is taken from the
first block, which is spread over the sample.
"""

from collections.abc import Mapping

import numpy as np
import torch

from moe_tool.artifacts.expert_statistics import PRICED_WIDTHS, ProbeStatistics
from moe_tool.errors import CorruptArtifactError
from moe_tool.profiling.similarity import linear_cka, token_cosines, token_grams

MIN_ROUTED_TOKENS = 8
"""Routed tokens below which an expert is measured on all sampled tokens instead."""
CKA_TOKENS = 256
"""Tokens that CKA compares; the kernels of 128 experts take 33 MB."""
_GRAM_BYTES = 4 * 2**20
"""Size of the inner products held at once; temporaries take about five times as much."""


def probe_blocks(
    n_tokens: int, *, n_experts: int, hidden: int, memory_bytes: int
) -> tuple[slice, ...]:
    """Return the blocks in which a sample is fed: slices, each spread over the whole sample.

    Args:
        memory_bytes: room for the outputs [E, b, H] float32 of one block of b tokens; a block has
            at least one.
    """
    most = max(1, memory_bytes // (n_experts * hidden * 4))
    n_blocks = -(-n_tokens // most)
    return tuple(slice(first, n_tokens, n_blocks) for first in range(n_blocks))


class ExpertProbe:
    """Sums over the sampled tokens of one part of the trace, in-sample or held-out."""

    def __init__(self, *, n_experts: int) -> None:
        """Start with no tokens."""
        square = (n_experts, n_experts)
        self._n_sampled = 0
        self._n_cka = 0
        self._cka = np.eye(n_experts, dtype=np.float32)
        self._n_routed = np.zeros(n_experts, np.int64)
        self._cosine = np.zeros(square)
        # Over all sampled tokens: <E_i, E_j>, and ||y||^2 of the layer's output y.
        self._inner = np.zeros(square)
        self._layer_energy = 0.0
        # Over tokens routed to i: <E_i, E_j>, ||E_j||^2, ||y||^2.
        self._routed_inner = np.zeros(square)
        self._routed_energy = np.zeros(square)
        self._routed_layer_energy = np.zeros(n_experts)

    def add_block(self, outputs: torch.Tensor, *, routed: np.ndarray, gate: np.ndarray) -> None:
        """Add all experts' outputs on b tokens; the first block also serves for CKA.

        Args:
            outputs: [E, b, H] float32.
            routed: [b, E] bool, the experts chosen for each token.
            gate: [b, E] float32, gate weights; 0 where not chosen. The weighted sum of outputs is
                taken as the layer's output, without shared experts.
        """
        n_experts, n_tokens, _ = outputs.shape
        if n_tokens == 0:
            return
        if self._n_sampled == 0:
            spread = outputs[:, :: -(-n_tokens // CKA_TOKENS)]
            self._n_cka = spread.shape[1]
            self._cka = linear_cka(spread)
        self._n_sampled += n_tokens
        self._n_routed += routed.sum(axis=0)
        at_once = max(1, _GRAM_BYTES // (n_experts * n_experts * 4))
        for first in range(0, n_tokens, at_once):
            rows = slice(first, first + at_once)
            self._add_grams(
                token_grams(outputs[:, rows]),
                torch.from_numpy(routed[rows].astype(np.float32)),
                torch.from_numpy(gate[rows].astype(np.float32)),
            )

    def _add_grams(self, grams: torch.Tensor, routed: torch.Tensor, gate: torch.Tensor) -> None:
        """Add [b, E, E] inner products; routed and gate [b, E] float32."""
        energy = grams.diagonal(dim1=1, dim2=2)  # [b, E]
        layer_energy = (torch.bmm(grams, gate[:, :, None])[:, :, 0] * gate).sum(dim=1)
        layer_energy = layer_energy.clamp_min(0)  # [b]; experts that cancel out round below 0
        self._cosine += token_cosines(grams).sum(dim=0, dtype=torch.float64).numpy()
        self._inner += grams.sum(dim=0, dtype=torch.float64).numpy()
        self._layer_energy += float(layer_energy.sum(dtype=torch.float64))
        self._routed_inner += (grams * routed[:, :, None]).sum(dim=0, dtype=torch.float64).numpy()
        routed = routed.double()
        self._routed_energy += (routed.T @ energy.double()).numpy()
        self._routed_layer_energy += (routed.T @ layer_energy.double()).numpy()

    def finish(self) -> ProbeStatistics:
        """Return the statistics of all blocks; without tokens every price is 1.

        Raises:
            CorruptArtifactError: an expert's output is not finite; its number is named.
        """
        broken = np.flatnonzero(~np.isfinite(self._inner.diagonal()))
        if broken.size:
            raise CorruptArtifactError(
                f"expert {broken[0]} puts out numbers that are not finite",
                hint="the checkpoint is damaged, or overflows in float32",
            )
        inner, energy, layer_energy = self._sums()
        own = inner.diagonal()  # [E]
        n_behind = np.where(self._fell_back, self._n_sampled, self._n_routed)
        ratio = np.divide(own, layer_energy, out=np.zeros_like(own), where=layer_energy > 0)
        scale = np.divide(inner, energy, out=np.zeros_like(inner), where=energy > 0)
        scale = scale.astype(np.float32)  # priced as it is stored
        price = self.price_of_scales(scale)
        np.fill_diagonal(price, 0.0 if self._n_sampled else 1.0)
        drop = np.where(own > 0, 1.0, 0.0) if self._n_sampled else np.ones(len(own))
        return ProbeStatistics(
            n_sampled=self._n_sampled,
            n_cka=self._n_cka,
            n_routed=self._n_routed.copy(),
            fell_back=self._fell_back,
            output_norm=np.sqrt(own / np.maximum(n_behind, 1)).astype(np.float32),
            output_ratio=np.sqrt(ratio).astype(np.float32),
            cosine=(self._cosine / max(self._n_sampled, 1)).astype(np.float32),
            cka=self._cka,
            scale=scale,
            eps_buddy=price,
            eps_drop=drop.astype(np.float32),
        )

    def price_of_scales(self, scale: np.ndarray) -> np.ndarray:
        """Return the price on these tokens of scales fitted on others, [E, E] float32.

        eps^2 = (||E_i||^2 - 2 a <E_i, E_j> + a^2 ||E_j||^2) / ||E_i||^2, each summed over tokens
        routed to i. It can exceed 1, since the scale was fitted on other tokens. If E_i is zero on
        all tokens, any other answer is priced 1; without tokens all prices are 1.

        Args:
            scale: [E, E] float32, factor a[i, j] on E_j's output in place of E_i's.
        """
        inner, energy, _ = self._sums()
        own = np.broadcast_to(inner.diagonal()[:, None], inner.shape)
        a = scale.astype(np.float64)
        error = np.maximum(own - 2 * a * inner + a * a * energy, 0.0)
        worthless = np.where((error > 0) | (self._n_sampled == 0), 1.0, 0.0)
        squared = np.divide(error, own, out=worthless, where=own > 0)
        price: np.ndarray = np.sqrt(squared).astype(np.float32)
        return price

    @property
    def _fell_back(self) -> np.ndarray:
        return self._n_routed < MIN_ROUTED_TOKENS

    def _sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return <E_i, E_j> [E, E], ||E_j||^2 [E, E], ||y||^2 [E] over the tokens behind i."""
        back = self._fell_back
        inner = np.where(back[:, None], self._inner, self._routed_inner)
        energy = np.where(back[:, None], self._inner.diagonal()[None, :], self._routed_energy)
        layer_energy = np.where(back, self._layer_energy, self._routed_layer_energy)
        return inner, energy, layer_energy


def bits_price(exact: torch.Tensor, approximations: Mapping[int, torch.Tensor]) -> np.ndarray:
    """Return an expert's price at each of PRICED_WIDTHS bits, [5] float32.

    Args:
        exact: [n, H] float32, the expert's output; without tokens all prices are 1.
        approximations: width_bits -> [n, H] float32, the output of the expert at that width.
    """
    energy = float(exact.double().square().sum())
    prices = []
    for width_bits in PRICED_WIDTHS:
        error = float((approximations[width_bits].double() - exact.double()).square().sum())
        if energy > 0:
            prices.append((error / energy) ** 0.5)
        else:
            prices.append(1.0 if error > 0 or exact.numel() == 0 else 0.0)
    return np.array(prices, np.float32)
