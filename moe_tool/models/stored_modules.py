"""Modules that compute in float32 from a weight in its stored form, without a float32 copy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from moe_tool.experts.linear import computes_natively, expanded, linear
from moe_tool.native.kernels import NativeLinear
from moe_tool.quantization.kept_codes import KeptWeight
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import FloatWeight, IntegerWeight

StoredWeight = FloatWeight | IntegerWeight | KeptWeight


class StoredLinear(nn.Module):
    """An `nn.Linear` over floats narrower than float32, or over codes."""

    def __init__(self, stored: StoredWeight, bias: nn.Parameter | None = None) -> None:
        """Hold the weight [out, in], which may be shared, and the bias [out]."""
        super().__init__()
        self.stored = stored
        self.out_features, self.in_features = stored.shape
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self._native: NativeLinear | None = None
        self._native_of: tuple[StoredWeight, nn.Parameter | None] | None = None

    @property
    def weight(self) -> torch.Tensor:
        """New float32 copy, [out, in], for architectures that read the weight themselves."""
        return _expanded(self.stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., out] of [..., in]; gradients flow to `x` only."""
        if torch.is_grad_enabled() and x.requires_grad:
            product: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return product
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same as `forward`, without a gradient."""
        rows = x.reshape(-1, self.in_features).to(torch.float32)
        if computes_natively(self.stored, rows.shape[0], is_expert=False):
            out = self._described().forward(rows)
        else:
            bias = None if self.bias is None else FloatWeight(values=self.bias)
            out = linear(rows, self.stored, bias, is_expert=False)
        return out.view(*x.shape[:-1], self.out_features)

    def _described(self) -> NativeLinear:
        """Return the kernels' description of the weight, cached because making it costs as much as
        a small product."""
        bias = self._parameters["bias"]
        made, of = self._native, self._native_of
        if made is None or of is None or of[0] is not self.stored or of[1] is not bias:
            made = NativeLinear(self.stored, None if bias is None else FloatWeight(values=bias))
            self._native, self._native_of = made, (self.stored, bias)
        return made


class _Product(torch.autograd.Function):
    """Linear map whose weight is expanded in forward and again in backward, but not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: StoredLinear) -> torch.Tensor:
        ctx.module = module
        return module.product(x)

    @staticmethod
    def backward(ctx: Any, by_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return by_output @ ctx.module.weight, None


class StoredEmbedding(nn.Module):
    """An `nn.Embedding` over floats narrower than float32."""

    def __init__(self, stored: FloatWeight) -> None:
        """Hold the table [n, H], which may be shared."""
        super().__init__()
        self.stored = stored
        self.num_embeddings, self.embedding_dim = stored.shape

    @property
    def weight(self) -> torch.Tensor:
        """New float32 copy, [n, H], for architectures that read the weight themselves."""
        return _expanded(self.stored)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids [...], [..., H] float32."""
        return F.embedding(ids, self.stored.values).to(torch.float32)


def put_stored(model: PreTrainedModel, parameter: str, stored: StoredWeight) -> None:
    """Replace the module of a weight by one that computes from `stored`; changes the model.

    Args:
        parameter: weight of an `nn.Linear`, `nn.Embedding` or `StoredLinear`.
    """
    name = parameter.rpartition(".")[0]
    module = model.get_submodule(name)
    if isinstance(module, StoredLinear):
        module.stored = stored
        return
    made: nn.Module
    if isinstance(module, nn.Embedding):
        assert isinstance(stored, FloatWeight)
        made = StoredEmbedding(stored)
    else:
        assert isinstance(module, nn.Linear)
        made = StoredLinear(stored, module.bias)
    made.train(module.training)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


def stored_weight(model: PreTrainedModel, parameter: str) -> StoredWeight | None:
    """Return the stored weight that a weight's module computes from; None for a parameter."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    return module.stored if isinstance(module, StoredLinear | StoredEmbedding) else None


def _expanded(stored: StoredWeight) -> torch.Tensor:
    if isinstance(stored, IntegerWeight):
        return dequantize(stored)
    return expanded(stored).values.to(torch.float32)
