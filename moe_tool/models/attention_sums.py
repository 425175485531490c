"""Attention that each token of a chunk receives, for policies that protect important tokens."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tool.errors import UsageError
from moe_tool.models.moe_layers import decoder_layers


class AttentionSums:
    """Listener to the attention of some layers.

    While it listens, the model computes attention eagerly, score matrices included; otherwise by
    its fast path.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[int]) -> None:
        """Hook the attention of the layers.

        Args:
            model: a transformers model.
            layers: decoder layers to listen to.

        Raises:
            UsageError: a layer has no attention that returns its weights.
        """
        self._config: Any = model.config.get_text_config()
        self._fast = self._config._attn_implementation
        self._is_listening = False
        self._received: dict[int, torch.Tensor] = {}
        self._hooks = []
        every = decoder_layers(model)
        for layer in layers:
            attention = getattr(every[layer], "self_attn", None)
            if not isinstance(attention, nn.Module):
                raise UsageError(
                    f"layer {layer} of this model has no attention whose sums could protect tokens",
                    hint="leave --lossy-prefill out, or take another policy",
                )
            self._hooks.append(attention.register_forward_hook(self._keep(layer)))

    def listen(self, is_on: bool) -> None:
        """Switch listening on or off for the next forward."""
        if is_on != self._is_listening:
            self._config._attn_implementation = "eager" if is_on else self._fast
            self._is_listening = is_on
        self._received.clear()

    def take(self, layer: int) -> torch.Tensor:
        """Return and forget the attention that each token received in a layer just computed,
        [B, S] float32.

        It is averaged over heads, and over the chunk's queries from the token on.
        """
        return self._received.pop(layer)

    def close(self) -> None:
        """Remove the hooks and restore the fast path."""
        self.listen(False)
        while self._hooks:
            self._hooks.pop().remove()

    def _keep(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: object, output: tuple[Any, ...]) -> None:
            if not self._is_listening:
                return
            weights = output[1]
            if weights is None:
                raise UsageError(
                    "this model's attention does not return its weights, so that no token of a "
                    "prompt could be protected",
                    hint="leave --lossy-prefill out, or take another policy",
                )
            self._received[layer] = received_attention(weights)

        return keep


def received_attention(weights: torch.Tensor) -> torch.Tensor:
    """Return the attention that each query's own token receives, [B, S] float32: the mean over
    heads and over the queries from it on.

    The released code of MC (arXiv:2410.06270) sums over keys instead, which is 1 for every token.

    Args:
        weights: [B, heads, S, S'] attention weights; the last S of the S' keys belong to the
            queries' tokens.
    """
    n_queries = weights.shape[2]
    own = weights[..., -n_queries:].float().mean(dim=1)  # [B, S, S]
    n_from_it_on = torch.arange(n_queries, 0, -1, dtype=torch.float32)
    return own.tril().sum(dim=1) / n_from_it_on
