"""Buddy map: for every expert a ranked list of substitutes with scale and price."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_tool.artifacts.identity import HexDigest, ModelIdentity
from moe_tool.artifacts.moe_shape import Count, Index
from moe_tool.artifacts.schema import FrozenModel

Similarity = Literal["output", "cka", "cosine", "coactivation", "router"]


class Buddy(FrozenModel):
    """One substitute for an expert."""

    expert: Index
    similarity: float
    """Similarity by the map's measure `by`; higher is better"""
    scale: float
    """Factor on the substitute's output, fitted in-sample"""
    price: Annotated[float, Field(ge=0)]
    """Relative error of the scaled output, in-sample (`eps_buddy`)"""
    price_held_out: Annotated[float, Field(ge=0)]
    """Relative error with the same scale on held-out tokens"""


class LayerBuddies(FrozenModel):
    """Substitutes of one MoE layer's experts."""

    layer: Index
    entropy_threshold: Annotated[float, Field(ge=0, le=1)]
    """BuddyMoE's tau: 15th percentile of the token activating entropy in the profile"""
    entropy_quantiles: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Quantiles of that entropy at 0, 1, ..., 100 %; empty in maps of earlier versions"""
    buddies: tuple[tuple[Buddy, ...], ...]
    """[E] lists of substitutes, best first"""
    clusters: tuple[Index, ...]
    """[E] cluster label of each expert (agglomerative, average linkage, on 1 - similarity)"""

    @model_validator(mode="after")
    def _consistent(self) -> "LayerBuddies":
        n_experts = len(self.buddies)
        quantiles = self.entropy_quantiles
        if len(quantiles) not in (0, 101) or list(quantiles) != sorted(quantiles):
            raise ValueError("entropy_quantiles are not 101 in ascending order")
        if len(self.clusters) != n_experts:
            raise ValueError("clusters and buddies differ in length")
        for expert_id, candidates in enumerate(self.buddies):
            named = [buddy.expert for buddy in candidates]
            if expert_id in named or len(set(named)) != len(named):
                raise ValueError(f"expert {expert_id} lists itself or one buddy twice")
            if any(other >= n_experts for other in named):
                raise ValueError(f"expert {expert_id} lists a buddy that does not exist")
        return self


class BuddyRules(FrozenModel):
    """Rules that the lists were made by; all but `scale` apply to co-activation alone."""

    alpha: Annotated[float, Field(ge=0, le=1)]
    """Cumulative frequency at which a list ends"""
    alpha_by_layer: tuple[tuple[Index, Annotated[float, Field(ge=0, le=1)]], ...]
    """Decoder layers with another alpha"""
    weighted: bool
    """Whether pairs were weighed by both gate weights"""
    smoothing: Annotated[float, Field(ge=0)]
    """Addition to the count of every pair"""
    warm_up: Annotated[int, Field(ge=0)]
    """Tokens at the head of each sequence that counted less"""
    warm_up_weight: Annotated[float, Field(ge=0, le=1)]
    """Weight of these tokens"""
    scale: Literal["fitted", "none"]
    """Factor on a substitute's output: the regression's, or 1"""


class BuddyMap(FrozenModel):
    """Artifact of `moe-tool buddies`."""

    kind: Literal["buddies"] = "buddies"
    format_version: Literal[1] = 1
    tool_version: str
    identity: ModelIdentity
    profile_sha256: HexDigest
    """sha256 of the profile that the map was made from"""
    by: Similarity
    k: Count
    rules: BuddyRules | None = None
    """Rules of the lists; None in maps of earlier versions"""
    layers: tuple[LayerBuddies, ...]
