"""Table of contents of a bundle: files, tables of records, stand-ins and provenance."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from moe_tool.artifacts.buddy_map import LayerBuddies, Similarity
from moe_tool.artifacts.bundle_sections import (
    MASK_ROUTER,
    N_FINE_QUANTILES,
    N_QUANTILES,
    RESIDENT_USE,
    ROUTING_NORM,
    ROW_TABLES,
    SOURCE_FILES,
    TUNED_FLOATS,
    LearnedPruning,
    QualityFigure,
    Section,
    SectionName,
    TunedFloats,
    parse_section,
)
from moe_tool.artifacts.form_table import (
    Basename,
    FormRecord,
    FormTable,
    Price,
    SizeBytes,
    Xxh3,
    check_form_tables,
)
from moe_tool.artifacts.identity import HexDigest, ModelIdentity
from moe_tool.artifacts.moe_shape import Index, MoeShape
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.artifacts.precision import Precision
from moe_tool.artifacts.resident_use import ResidentUse
from moe_tool.artifacts.routing_norm import RoutingNorm
from moe_tool.artifacts.row_tables import RowTables
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.artifacts.source_files import PLACED_KINDS, SourceFiles

Quantiles = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], ...],
    Field(min_length=N_QUANTILES, max_length=N_QUANTILES),
]
"""0 %, 5 %, ... 100 %"""
FineQuantiles = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], ...],
    Field(min_length=N_QUANTILES, max_length=N_FINE_QUANTILES),
]
"""Quantiles at equal steps from 0 to 100 %; `pack` writes 0 %, 1 %, ... 100 %"""


class BundleFile(FrozenModel):
    """One file of the bundle."""

    name: Basename
    size_bytes: SizeBytes
    sha256: HexDigest


class SkeletonTensor(FrozenModel):
    """One tensor that belongs to no expert."""

    name: str
    xxh3: Xxh3
    """xxh3-64 of the tensor's bytes, checked at every read"""


class SkeletonLinear(FrozenModel):
    """One matrix of the skeleton that is stored as codes, in the tensors `PARAMETER.plane0`, ...,
    `PARAMETER.scales`."""

    parameter: Annotated[str, Field(min_length=1, max_length=512)]
    """Name in transformers' model"""
    n_outputs: Annotated[int, Field(ge=1, lt=2**31)]
    n_inputs: Annotated[int, Field(ge=1, lt=2**31)]


class BundleBuddies(FrozenModel):
    """The stand-ins compiled into the bundle."""

    by: Similarity
    layers: tuple[LayerBuddies, ...]


class LayerHeat(FrozenModel):
    """Use of each expert of a layer."""

    layer: Index
    load: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    """[E]: share of in-sample tokens routed to each expert"""


class Calibration(FrozenModel):
    """Result of `moe-tool calibrate`: the default policy of `run` with its measured KL."""

    policy: Annotated[str, Field(pattern=r"^[a-z0-9:=,.+\-]{1,200}$")]
    """Policy in the syntax of `--policy`"""
    max_kl: Price
    """Limit that the upper end of the interval keeps"""
    quality: QualityFigure
    """KL(exact || policy), each token predicted from context that the policy computed"""
    domains: dict[Annotated[str, Field(max_length=128)], QualityFigure]
    sources: Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=64)]
    """Origin of the text"""
    expert_slots: Annotated[int, Field(ge=1, le=2**31)]
    """Primary records that fitted into memory; the limit is not guaranteed with fewer"""
    nats_per_price: Price
    """Measured divergence per predicted one"""

    @property
    def domain_names(self) -> str:
        """Kinds of text that the promise rests on, e.g. "wiki, reviews"."""
        return ", ".join(self.domains) or "unnamed text"


class LayerPrices(FrozenModel):
    """Prices of dropping experts of one layer, from the profile.

    An answer with error eps in a slot of gate weight g adds nats * (g * eps)^2 to the divergence
    of the model's output, in expectation: see artifacts/expert_statistics.
    """

    layer: Index
    nats: tuple[Price, ...]
    """[E]: sensitivity of the layer times the squared ratio of the expert's output norm to the
    layer's"""
    use: tuple[Price, ...]
    """[E]: mean over all tokens of the squared gate weight, counted as 0 for unselected experts"""
    unimportance: FineQuantiles
    """Quantiles, over all slots, of the share of the token's gate weight in heavier slots"""
    ratio: Quantiles
    """Quantiles, over all slots but each token's heaviest, of gate weight over the largest"""


class TunedWeights(FrozenModel):
    """One change of a bundle's codes by `moe-tool tune weights`."""

    parent_sha256: HexDigest
    """Hash of the manifest of the bundle before tuning"""
    sources: Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=64)]
    """Origin of the text"""
    tokens: Annotated[int, Field(ge=1, le=2**40)]
    """Tokens of text, held-out ones included"""
    tokens_sha256: HexDigest
    """Hash of the token ids (int32) and of the held-out mask over sequences"""
    steps: Annotated[int, Field(ge=1, le=2**31)]
    """Steps per layer"""
    batch_tokens: Annotated[int, Field(ge=1, le=2**31)]
    """Tokens per step"""
    optimizer: Literal["sgd", "adam"]
    rounding: Literal["nearest", "stochastic"]
    feedback: Literal["momentum", "none"]
    """Destination of the rounding error"""
    rate: Annotated[float, Field(gt=0, le=1e6)]
    """Learning rate of the first step, in codes"""
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class BundleManifest(FrozenModel):
    """Artifact of `moe-tool pack`, written last: no manifest, no bundle."""

    kind: Literal["bundle"] = "bundle"
    format_version: Literal[3] = 3
    tool_version: str
    identity: ModelIdentity
    shape: MoeShape
    record_layout: Literal["planes-1"] = "planes-1"
    """Id of the layout that formats/expert_form.py writes"""
    forms: Annotated[tuple[FormTable, ...], Field(min_length=1, max_length=64)]
    """Primary tables by descending bits, then cheaper ones by descending cost, then selectors"""
    removed: tuple[tuple[Index, Index], ...] = ()
    """Experts without a record, as (layer, expert): their slots are always dropped"""
    skeleton: tuple[SkeletonTensor, ...]
    """Every tensor of the skeleton files"""
    skeleton_precision: Precision
    """Precision of the matrices in `skeleton_linears`; the rest keeps the checkpoint's dtype"""
    skeleton_linears: tuple[SkeletonLinear, ...]
    """Quantized matrices; empty if `skeleton_precision` is native"""
    files: tuple[BundleFile, ...]
    """Every file but the manifest, also those whose records stay in the checkpoint's files"""
    made_from: dict[str, str]
    """Options of `pack` and hashes of its inputs; resuming or repeating with others is refused"""
    profile_sha256: HexDigest | None
    heat: tuple[LayerHeat, ...] | None
    """Loads from the profile; None if packed without one"""
    buddies: BundleBuddies | None
    prices: tuple[LayerPrices, ...] | None = None
    """Prices from the profile; None if packed without one"""
    calibration: Calibration | None = None
    """Lossy policy that `run` uses by default; None: exact"""
    plan: PackPlan | None = None
    """Plan that `run` follows by default"""
    lineage: Annotated[tuple[TunedWeights, ...], Field(max_length=64)] = ()
    """Changes of the codes since packing, in order"""
    sections: Annotated[dict[SectionName, Section], Field(max_length=64)] = {}
    """Additions by name, see artifacts/bundle_sections.py"""

    @property
    def primaries(self) -> tuple[FormTable, ...]:
        return tuple(table for table in self.forms if table.role == "primary")

    @property
    def cheaper(self) -> tuple[FormTable, ...]:
        """Tables of replicas and nested bases, by descending cost"""
        return tuple(table for table in self.forms if table.role in ("replica", "base"))

    @property
    def selectors(self) -> tuple[FormTable, ...]:
        return tuple(table for table in self.forms if table.role == "selector")

    @property
    def primary_records(self) -> tuple[FormRecord, ...]:
        """One record per stored expert, table by table"""
        return tuple(record for table in self.primaries for record in table.records)

    @property
    def primary_bytes(self) -> int:
        """Size of the primary records, channel selectors included"""
        return sum(table.size_bytes for table in (*self.primaries, *self.selectors))

    @property
    def primary_counts(self) -> dict[str, int]:
        """Number of experts by primary precision (as in `pack --bits`), and of removed ones"""
        found = {table.name: len(table.records) for table in self.primaries}
        return found | ({"removed": len(self.removed)} if self.removed else {})

    @property
    def bits(self) -> str:
        """Primary precision as in `pack --bits`; mixed if there are several"""
        return self.primaries[0].name if len(self.primaries) == 1 else "mixed"

    @property
    def pruning(self) -> LearnedPruning | None:
        """Learned mask routers; None until they are trained"""
        section = self.sections.get(MASK_ROUTER)
        found = None if section is None else parse_section(MASK_ROUTER, section)
        assert found is None or isinstance(found, LearnedPruning)
        return found

    @property
    def sources(self) -> SourceFiles | None:
        """Files of the checkpoint that hold records; None if all are in the bundle"""
        section = self.sections.get(SOURCE_FILES)
        found = None if section is None else parse_section(SOURCE_FILES, section)
        assert found is None or isinstance(found, SourceFiles)
        return found

    @property
    def row_tables(self) -> RowTables | None:
        """Tables that can stay on disk; None in bundles that were packed without their hashes"""
        section = self.sections.get(ROW_TABLES)
        found = None if section is None else parse_section(ROW_TABLES, section)
        assert found is None or isinstance(found, RowTables)
        return found

    @property
    def resident_use(self) -> ResidentUse | None:
        """Use that residents are chosen by; None: the profile's mean, of `prices` and `heat`"""
        section = self.sections.get(RESIDENT_USE)
        found = None if section is None else parse_section(RESIDENT_USE, section)
        assert found is None or isinstance(found, ResidentUse)
        return found

    @property
    def routing_norm(self) -> RoutingNorm | None:
        """Norm of the profile's routing; None if packed without a profile, or with a short one"""
        section = self.sections.get(ROUTING_NORM)
        found = None if section is None else parse_section(ROUTING_NORM, section)
        assert found is None or isinstance(found, RoutingNorm)
        return found

    @property
    def tuned_floats(self) -> TunedFloats | None:
        """Norms and routers trained beside the codes; None if they were not trained"""
        section = self.sections.get(TUNED_FLOATS)
        found = None if section is None else parse_section(TUNED_FLOATS, section)
        assert found is None or isinstance(found, TunedFloats)
        return found

    @property
    def written_files(self) -> tuple[BundleFile, ...]:
        """Files in the bundle's own folder, without the manifest"""
        sources = self.sources
        forms = () if sources is None else (self.forms[table.form] for table in sources.tables)
        placed = {record.file for form in forms for record in form.records}
        return tuple(file for file in self.files if file.name not in placed)

    def stored(self, layer: int) -> np.ndarray:
        """Return which experts of a layer have a record, [E] bool."""
        mask = np.ones(self.shape.experts, dtype=bool)
        mask[[expert for at, expert in self.removed if at == layer]] = False
        return mask

    @model_validator(mode="after")
    def _consistent(self) -> "BundleManifest":
        sizes = {file.name: file.size_bytes for file in self.files}
        if len(sizes) != len(self.files):
            raise ValueError("a file is listed twice")
        check_form_tables(self.forms, self.removed, self.shape, sizes)
        self._check_tables()
        self._check_skeleton()
        for name, section in self.sections.items():
            parse_section(name, section)
        self._check_pruning()
        self._check_sources()
        self._check_routing_norm()
        return self

    def _check_skeleton(self) -> None:
        names = [tensor.name for tensor in self.skeleton]
        parameters = [linear.parameter for linear in self.skeleton_linears]
        if len(set(names)) != len(names) or len(set(parameters)) != len(parameters):
            raise ValueError("a tensor of the skeleton is listed twice")
        if parameters and not self.skeleton_precision.is_coded:
            raise ValueError("a native skeleton stores no matrix as codes")
        tables = self.row_tables
        unknown = {part.tensor for part in tables.parts} - set(names) if tables else ()
        tuned = self.tuned_floats
        if tuned and not set(tuned.tensors) <= set(names):
            raise ValueError("a trained tensor is not in the skeleton")
        if unknown:
            raise ValueError("a table is no tensor of the skeleton")

    def _check_pruning(self) -> None:
        pruning = self.pruning
        if pruning is None:
            return
        if pruning.file not in {file.name for file in self.files}:
            raise ValueError("the file of the pruning is not listed")
        if self.shape.top_k < 2:
            raise ValueError("a model of one expert per token has nothing to prune")

    def _check_routing_norm(self) -> None:
        norm = self.routing_norm
        if norm is None:
            return
        if [each.layer for each in norm.layers] != list(self.shape.layers):
            raise ValueError("the routing norm does not fit the model's layers")
        if any(each.experts[-1] >= self.shape.experts for each in norm.layers):
            raise ValueError("the routing norm watches an expert that the model does not have")

    def _check_sources(self) -> None:
        section = self.sections.get(SOURCE_FILES)
        if section is not None and not section.required:
            raise ValueError("the source files of records are not marked as required")
        body = self.sources
        for placed in () if body is None else body.tables:
            table = self.forms[placed.form] if placed.form < len(self.forms) else None
            if table is None or table.role != "primary" or table.precision.kind not in PLACED_KINDS:
                raise ValueError("records that no checkpoint holds lie in its files")
            if len(placed.parts) != len(table.records):
                raise ValueError("the parts of records are not as many as the records")

    def _check_tables(self) -> None:
        tables: dict[str, list[tuple[int, int]]] = {}
        if self.heat is not None:
            tables["heat"] = [(entry.layer, len(entry.load)) for entry in self.heat]
        if self.buddies is not None:
            tables["buddies"] = [(e.layer, len(e.buddies)) for e in self.buddies.layers]
        if self.prices is not None:
            tables["nats"] = [(entry.layer, len(entry.nats)) for entry in self.prices]
            tables["use"] = [(entry.layer, len(entry.use)) for entry in self.prices]
        if self.resident_use is not None:
            uses = self.resident_use.layers
            tables["resident use"] = [(entry.layer, len(entry.load)) for entry in uses]
        for what, found in tables.items():
            if found != [(layer, self.shape.experts) for layer in self.shape.layers]:
                raise ValueError(f"the {what} table does not fit the model's layers and experts")
