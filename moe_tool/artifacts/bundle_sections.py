"""Named sections of a bundle manifest: additions that need no new format version.

SECTIONS lists the known names with the schemas of their bodies. A section of an unknown name is
ignored (and kept) if optional, and refused by name if required.
"""

import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, JsonValue, ValidationError, model_validator

from moe_tool.artifacts.form_table import Price
from moe_tool.artifacts.resident_use import ResidentUse
from moe_tool.artifacts.routing_norm import RoutingNorm
from moe_tool.artifacts.row_tables import RowTables
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.artifacts.source_files import SourceFiles

SectionName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9\-]{0,63}$")]
MASK_ROUTER = "mask-router"
RESIDENT_USE = "resident-use"
ROUTING_NORM = "routing-norm"
ROW_TABLES = "row-tables"
SOURCE_FILES = "source-files"
TUNED_FLOATS = "tuned-floats"
Share = Annotated[float, Field(ge=0, le=1)]
SignedPrice = Annotated[float, Field(ge=-1e30, le=1e30)]
MASK_ROUTER_FILE = r"^pruning-[0-9a-f]{16}\.safetensors$"
"""Name of the routers' file: it has the start of its sha256"""
N_QUANTILES = 21
N_FINE_QUANTILES = 101
"""Quantiles of a distribution with atoms, of which a step must not hide more than 1 %"""


class Section(FrozenModel):
    """One section."""

    required: bool
    """Whether a reader that does not know the section has to refuse the bundle"""
    body: dict[str, JsonValue]


class QualityFigure(FrozenModel):
    """Measured KL with its 95 % interval, nats per token."""

    kl: Price
    kl_ci95: tuple[Price, Price]
    tokens: Annotated[int, Field(ge=1, le=2**40)]


class LearnedPruning(FrozenModel):
    """Mask routers trained by `moe-tool tune pruning`, used by `prune:learned`."""

    file: Annotated[str, Field(pattern=MASK_ROUTER_FILE)]
    """Safetensors file of the routers' tensors"""
    rate: Annotated[float, Field(gt=0, lt=1)]
    """Share of the chosen experts that the training aimed to drop"""
    offsets: Annotated[
        tuple[Annotated[float, Field(ge=-1e30, le=1e30)], ...],
        Field(min_length=N_QUANTILES, max_length=N_QUANTILES),
    ]
    """Router scores above which a slot is kept: ascending thresholds that drop 0 %, 5 %, ... 100 %
    of the slots after the heaviest on held-out tokens"""
    penalty: Price
    """Final training penalty, nats per kept slot after the heaviest"""
    quality: QualityFigure
    """KL(exact || pruned) at `rate`, on held-out tokens"""
    tokens: Annotated[int, Field(ge=1, le=2**40)]
    """Tokens trained on"""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    sources: Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=64)]
    """Origin of the text"""

    @model_validator(mode="after")
    def _rising(self) -> "LearnedPruning":
        if list(self.offsets) != sorted(self.offsets):
            raise ValueError("the offsets of the pruning fall")
        return self


class TunedFloats(FrozenModel):
    """Norms and routers trained by `tune weights --norms --router`, and what was kept of them."""

    norms: Share | None
    """Share of the way from the checkpoint's norms to the trained ones that was kept, 0 for
    nothing; None: not trained"""
    router: Share | None
    """Share of the way from the checkpoint's routers to the trained ones; likewise"""
    tensors: Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=2**20)]
    """Tensors of the skeleton that are not the checkpoint's, float32; none if nothing was kept"""
    rate: Annotated[float, Field(ge=0, le=1)]
    """Learning rate of the first step, as a share of a tensor's root mean square"""
    codes_alone: QualityFigure
    """KL(checkpoint || bundle) with the checkpoint's norms and routers, on held-out tokens that
    chose nothing"""
    best: QualityFigure
    """KL(checkpoint || bundle) with the best of the trained ones, kept or not, on the same"""
    change_ci95: tuple[SignedPrice, SignedPrice]
    """Interval of the mean difference of the two by sequence; kept only where it lies below 0"""
    rerouted: Annotated[
        tuple[tuple[Annotated[int, Field(ge=0, lt=2**31)], Share], ...], Field(max_length=65536)
    ]
    """Layers with the share of their chosen experts that codes alone would not have chosen, on the
    same tokens"""

    @property
    def is_kept(self) -> bool:
        """Whether the bundle has anything of what was trained."""
        return bool(self.tensors)

    @model_validator(mode="after")
    def _consistent(self) -> "TunedFloats":
        if self.norms is None and self.router is None:
            raise ValueError("neither norms nor routers were trained")
        if self.is_kept != bool(self.norms or self.router):
            raise ValueError("the tensors are not those of what was kept")
        if len(set(self.tensors)) != len(self.tensors):
            raise ValueError("a trained tensor is listed twice")
        return self


SECTIONS: dict[str, type[FrozenModel]] = {
    MASK_ROUTER: LearnedPruning,
    RESIDENT_USE: ResidentUse,
    ROUTING_NORM: RoutingNorm,
    ROW_TABLES: RowTables,
    SOURCE_FILES: SourceFiles,
    TUNED_FLOATS: TunedFloats,
}
"""Name -> schema of the body"""


def parse_section(name: str, section: Section) -> FrozenModel | None:
    """Return the body of a section; None if the name is unknown.

    Raises:
        ValueError: the body does not match the schema.
    """
    schema = SECTIONS.get(name)
    if schema is None:
        return None
    try:
        # The JSON mode takes lists for tuples, which the strict Python mode would refuse.
        return schema.model_validate_json(json.dumps(section.body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def unknown_required(sections: Mapping[str, Section]) -> list[str]:
    """Return the names of required sections unknown to this version."""
    return sorted(name for name, each in sections.items() if each.required and name not in SECTIONS)
