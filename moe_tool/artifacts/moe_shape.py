"""Shape of a Mixture-of-Experts model: layers, experts, top-k, the tensors of one expert."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_tool.artifacts.schema import FrozenModel

Count = Annotated[int, Field(ge=1, le=2**31)]
Index = Annotated[int, Field(ge=0, le=2**31)]
FloatName = Literal["float32", "bfloat16", "float16"]
FLOAT_SIZE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class ExpertTensor(FrozenModel):
    """One tensor of one expert; matrices are [out, in] whatever the checkpoint's layout."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
    """Parameter name in the experts module: gate_up_proj, up_proj, down_proj, gate_up_proj_bias,
    ..."""
    shape: tuple[Count, ...]
    """Extents: [out, in] for a matrix, [out] for a bias; rows of gate_up_proj in module order."""

    @property
    def n_weights(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


class MoeShape(FrozenModel):
    """Dimensions of an architecture, read from its transformers modules."""

    model_type: str
    n_decoder_layers: Count
    layers: tuple[Index, ...]
    """Decoder-layer indices that have experts, ascending."""
    experts: Count
    """E: experts per MoE layer, the same in all of them."""
    top_k: Count
    """K: experts chosen per token."""
    hidden: Count
    """H: width of the residual stream."""
    vocabulary: Count
    """V: rows of the embedding."""
    dtype: FloatName
    """Dtype of the expert weights in the checkpoint."""
    expert_tensors: tuple[ExpertTensor, ...]
    """Tensors of one expert, in the order of the experts module's parameters."""

    @model_validator(mode="after")
    def _consistent(self) -> "MoeShape":
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must be ascending, distinct and not empty")
        if self.layers[-1] >= self.n_decoder_layers:
            raise ValueError("a MoE layer lies beyond the last decoder layer")
        if self.top_k > self.experts:
            raise ValueError("top_k exceeds the number of experts")
        names = [tensor.name for tensor in self.expert_tensors]
        if not names or len(set(names)) != len(names):
            raise ValueError("an expert needs distinct tensors")
        return self

    @property
    def expert_hidden(self) -> int:
        """Width of an expert's input and output: H, or that of a latent in which experts work."""
        return next(t.shape[1] for t in self.expert_tensors if len(t.shape) == 2)

    @property
    def n_expert_weights(self) -> int:
        """Scalars in one expert, biases included."""
        return sum(tensor.n_weights for tensor in self.expert_tensors)
