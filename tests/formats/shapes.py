"""A model of one layer whose experts have given tensors."""

from collections.abc import Iterable

from moe_tool.artifacts.moe_shape import ExpertTensor, FloatName, MoeShape


def shape_of(
    tensors: Iterable[ExpertTensor], dtype: FloatName = "bfloat16", *, hidden: int = 8
) -> MoeShape:
    """Return the shape of a model with two such experts."""
    return MoeShape(
        model_type="mixtral",
        n_decoder_layers=1,
        layers=(0,),
        experts=2,
        top_k=1,
        hidden=hidden,
        vocabulary=8,
        dtype=dtype,
        expert_tensors=tuple(tensors),
    )
