"""The table of contents of a bundle: files, records, residency order, stand-ins, and what all of it
was made from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_tool.artifacts.buddy_map import LayerBuddies, Similarity
from moe_tool.artifacts.identity import HexDigest, ModelIdentity
from moe_tool.artifacts.moe_shape import Index, MoeShape
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.artifacts.precision import (
    ChannelPrecision,
    ExpertPrecision,
    IntegerPrecision,
    NativePrecision,
    Precision,
    ReplicaPrecision,
    describe_precision,
)
from moe_tool.artifacts.schema import FrozenModel

BUNDLE_VERSION: Literal[2] = 2
RECORD_LAYOUT: Literal["planes-1"] = "planes-1"
"""Id of the record layout that formats/expert_record.py writes; another one is refused with the
command that repacks."""
ALIGNMENT_BYTES = 4096
Basename = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=128)]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
SizeBytes = Annotated[int, Field(ge=0, le=2**50)]


class BundleFile(FrozenModel):
    """One file of the bundle."""

    name: Basename
    size_bytes: SizeBytes
    sha256: HexDigest


class ExpertRecord(FrozenModel):
    """Where one expert lies."""

    layer: Index
    expert: Index
    file: Basename
    offset: SizeBytes
    """From the start of the file, a multiple of ALIGNMENT_BYTES"""
    xxh3: Xxh3
    """xxh3-64 of the record's bytes"""


class SkeletonTensor(FrozenModel):
    """One tensor that is not an expert's."""

    name: str
    xxh3: Xxh3
    """xxh3-64 of its bytes, checked whenever it is read"""


class SkeletonLinear(FrozenModel):
    """One matrix of the skeleton that is stored as codes, in the tensors `PARAMETER.plane0`, ...,
    `PARAMETER.scales`."""

    parameter: Annotated[str, Field(min_length=1, max_length=512)]
    """Its name in transformers' model"""
    n_outputs: Annotated[int, Field(ge=1, lt=2**31)]
    n_inputs: Annotated[int, Field(ge=1, lt=2**31)]


class BundleBuddies(FrozenModel):
    """The stand-ins compiled into the bundle."""

    by: Similarity
    layers: tuple[LayerBuddies, ...]


class LayerHeat(FrozenModel):
    """How often each expert of a layer is used."""

    layer: Index
    load: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    """[E]: share of in-sample tokens routed to each expert"""


Price = Annotated[float, Field(ge=0, le=1e30)]


N_QUANTILES = 21
Quantiles = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], ...],
    Field(min_length=N_QUANTILES, max_length=N_QUANTILES),
]
"""0 %, 5 %, ... 100 %"""


class ReplicaLayer(FrozenModel):
    """What one form of the experts of a layer was measured to be worth."""

    layer: Index
    eps: tuple[Price, ...]
    """[E]: error of the form's output relative to the checkpoint's expert, on held-out tokens; 1
    where there is no such form of an expert"""


class ReplicaTable(FrozenModel):
    """Cheaper forms of experts, all written in one way, that may answer in an expert's place.

    Of the first bits of nested experts the records are the beginnings of the experts' own.
    """

    precision: ReplicaPrecision
    record_size_bytes: Annotated[int, Field(ge=ALIGNMENT_BYTES, le=2**40)]
    """The same for every record of the table; a multiple of ALIGNMENT_BYTES"""
    records: tuple[ExpertRecord, ...]
    """In file order; of any experts, each at most once"""
    prices: tuple[ReplicaLayer, ...]
    """One entry per layer"""

    @property
    def is_base(self) -> bool:
        """Whether these are the first bits of nested experts."""
        return isinstance(self.precision, IntegerPrecision) and self.precision.of_bits is not None


class OwnTable(FrozenModel):
    """Experts whose own form is another one than most experts have."""

    precision: Precision
    record_size_bytes: Annotated[int, Field(ge=ALIGNMENT_BYTES, le=2**40)]
    """The same for every record of the table; a multiple of ALIGNMENT_BYTES"""
    records: Annotated[tuple[ExpertRecord, ...], Field(min_length=1)]
    """In file order"""


class ChooserTable(FrozenModel):
    """What stays in memory of every expert whose channels are stored one by one: the matrix that
    chooses them, thresholds, and the hash of each channel."""

    record_size_bytes: Annotated[int, Field(ge=ALIGNMENT_BYTES, le=2**40)]
    """The same for every record of the table; a multiple of ALIGNMENT_BYTES"""
    records: tuple[ExpertRecord, ...]
    """Of every expert, in file order"""


class QualityFigure(FrozenModel):
    """A measured divergence, nats per token."""

    kl: Price
    kl_ci95: tuple[Price, Price]
    tokens: Annotated[int, Field(ge=1, le=2**40)]


class Calibration(FrozenModel):
    """What `moe-tool calibrate` found: the policy that `run` follows, and what it costs."""

    policy: Annotated[str, Field(pattern=r"^[a-z0-9:=,.+\-]{1,200}$")]
    """As `--policy` takes it"""
    max_kl: Price
    """What the upper end of the interval was to keep"""
    quality: QualityFigure
    """KL(exact || policy), each token predicted after the policy's own ones"""
    domains: dict[Annotated[str, Field(max_length=128)], QualityFigure]
    sources: Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=64)]
    """Where the text came from"""
    expert_slots: Annotated[int, Field(ge=1, le=2**31)]
    """Of full experts that the memory budget had room for: with fewer it does not hold"""
    nats_per_price: Price
    """Measured divergence per predicted one"""


class LearnedPruning(FrozenModel):
    """Mask routers that `moe-tool tune pruning` trained: what `prune:learned` asks."""

    file: Basename
    """Of the routers' tensors"""
    rate: Annotated[float, Field(gt=0, lt=1)]
    """Share of the chosen experts that they were trained to leave out"""
    offsets: Annotated[
        tuple[Annotated[float, Field(ge=-1e30, le=1e30)], ...],
        Field(min_length=N_QUANTILES, max_length=N_QUANTILES),
    ]
    """What a slot has to be worth to be kept, so that on held-out tokens 0 %, 5 %, ... 100 % of the
    slots after the heaviest are left out; never falls"""
    penalty: Price
    """Nats per kept slot after the heaviest, at the end of the training"""
    quality: QualityFigure
    """KL(exact || pruned) at that rate, on held-out tokens"""
    tokens: Annotated[int, Field(ge=1, le=2**40)]
    """Trained on"""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    sources: Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=64)]
    """Where the text came from"""

    @model_validator(mode="after")
    def _rising(self) -> "LearnedPruning":
        if list(self.offsets) != sorted(self.offsets):
            raise ValueError("the offsets of the pruning fall")
        return self


class LayerPrices(FrozenModel):
    """What it costs to leave experts of one layer out, from the profile.

    An answer with error eps in a slot of gate weight g adds nats * (g * eps)^2 to the divergence
    of the model's output, in expectation: see artifacts/expert_statistics.
    """

    layer: Index
    nats: tuple[Price, ...]
    """[E]: sensitivity of the layer times the squared ratio of the expert's output to its own"""
    use: tuple[Price, ...]
    """[E]: mean over all tokens of the squared gate weight; 0 where the expert is not wanted"""
    unimportance: Quantiles
    """Of the share of a token's gate weight that is above a slot, over all slots"""
    ratio: Quantiles
    """Of a slot's gate weight over the token's largest, over all slots but the heaviest"""


class TunedWeights(FrozenModel):
    """How a bundle's codes were changed: one run of `moe-tool tune weights`."""

    parent_sha256: HexDigest
    """Of the manifest of the bundle that it began with"""
    sources: Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=64)]
    """Where the text came from"""
    tokens: Annotated[int, Field(ge=1, le=2**40)]
    """Of it, held-out ones included"""
    tokens_sha256: HexDigest
    """Of their ids, int32, and of which sequences were held out"""
    steps: Annotated[int, Field(ge=1, le=2**31)]
    """Of every layer"""
    batch_tokens: Annotated[int, Field(ge=1, le=2**31)]
    """Of a step"""
    optimizer: Literal["sgd", "adam"]
    rounding: Literal["nearest", "stochastic"]
    feedback: Literal["momentum", "none"]
    """Where what rounding loses goes"""
    rate: Annotated[float, Field(gt=0, le=1e6)]
    """Learning rate of the first step, in codes"""
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class BundleManifest(FrozenModel):
    """The artifact of `moe-tool pack`, written last: no manifest, no bundle."""

    kind: Literal["bundle"] = "bundle"
    format_version: Literal[2] = BUNDLE_VERSION
    tool_version: str
    identity: ModelIdentity
    shape: MoeShape
    precision: ExpertPrecision
    """Of the experts in `records`"""
    record_layout: Literal["planes-1"] = RECORD_LAYOUT
    record_size_bytes: Annotated[int, Field(ge=ALIGNMENT_BYTES, le=2**40)]
    """The same for every record; a multiple of ALIGNMENT_BYTES"""
    records: tuple[ExpertRecord, ...]
    """In file order: layer by layer, hot experts first with those they are used with"""
    others: Annotated[tuple[OwnTable, ...], Field(max_length=16)] = ()
    """Experts that have another number of bits; the most bits first"""
    absent: tuple[tuple[Index, Index], ...] = ()
    """(layer, expert) of those that are left out for good: nothing answers for them"""
    choosers: ChooserTable | None = None
    """Of a bundle whose `records` hold channels; None of any other"""
    errors: tuple[ReplicaLayer, ...] | None = None
    """What the experts' own forms were measured to be off from the checkpoint's, one entry per
    layer; None where nothing was measured"""
    skeleton: tuple[SkeletonTensor, ...]
    """Every tensor of the skeleton files"""
    skeleton_precision: Precision
    """Of the matrices in `skeleton_linears`; everything else keeps the checkpoint's dtype"""
    skeleton_linears: tuple[SkeletonLinear, ...]
    """Empty where `skeleton_precision` is native"""
    files: tuple[BundleFile, ...]
    """Every file but the manifest"""
    made_from: dict[str, str]
    """The options of `pack` and the hashes of its inputs: a resume or a repetition with others is
    refused"""
    profile_sha256: HexDigest | None
    heat: tuple[LayerHeat, ...] | None
    """From the profile; None where the bundle was packed without one"""
    buddies: BundleBuddies | None
    replicas: tuple[ReplicaTable, ...] = ()
    """The dearest first"""
    prices: tuple[LayerPrices, ...] | None = None
    """None where the bundle was packed without a profile"""
    calibration: Calibration | None = None
    """The lossy policy that `run` follows where nothing else is asked for; None: exact"""
    pruning: LearnedPruning | None = None
    """None until it is trained"""
    plan: PackPlan | None = None
    """What `run` follows where nothing else is asked for"""
    lineage: Annotated[tuple[TunedWeights, ...], Field(max_length=64)] = ()
    """What was done to the codes since they were packed, in order"""

    @property
    def own_records(self) -> tuple[ExpertRecord, ...]:
        """Of all experts that are not absent, in the form that each has of its own."""
        return (*self.records, *(record for own in self.others for record in own.records))

    @property
    def own_bytes(self) -> int:
        """Of these records, choosers of channels included."""
        sizes = [(self.record_size_bytes, self.records)]
        sizes += [(own.record_size_bytes, own.records) for own in self.others]
        if self.choosers is not None:
            sizes.append((self.choosers.record_size_bytes, self.choosers.records))
        return sum(size * len(records) for size, records in sizes)

    @property
    def own_bits(self) -> dict[str, int]:
        """How many experts have each precision of their own, as `pack --bits` names it; absent
        ones too."""
        found = {describe_precision(self.precision): len(self.records)}
        found |= {describe_precision(own.precision): len(own.records) for own in self.others}
        return found | ({"absent": len(self.absent)} if self.absent else {})

    @model_validator(mode="after")
    def _consistent(self) -> "BundleManifest":
        self._check_experts()
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError("a file is listed twice")
        self._check_places(self.records, self.record_size_bytes)
        for own in self.others:
            self._check_places(own.records, own.record_size_bytes)
        self._check_replicas()
        self._check_choosers()
        self._check_tables()
        self._check_skeleton()
        self._check_pruning()
        return self

    def _check_experts(self) -> None:
        layers, n_experts = set(self.shape.layers), self.shape.experts
        keys = [(r.layer, r.expert) for r in self.records]
        keys += [(r.layer, r.expert) for own in self.others for r in own.records]
        keys += self.absent
        found = set(keys)
        # Counted first: a damaged number of experts must not become a set of that size.
        if (
            len(keys) != len(layers) * n_experts
            or len(found) != len(keys)
            or any(layer not in layers or expert >= n_experts for layer, expert in found)
        ):
            raise ValueError("the record table does not hold every expert exactly once")
        if self.replicas and (self.others or self.absent):
            raise ValueError("a bundle of experts of several widths has no replicas beside them")

    def _check_skeleton(self) -> None:
        names = [tensor.name for tensor in self.skeleton]
        parameters = [linear.parameter for linear in self.skeleton_linears]
        if len(set(names)) != len(names) or len(set(parameters)) != len(parameters):
            raise ValueError("a tensor of the skeleton is listed twice")
        if parameters and isinstance(self.skeleton_precision, NativePrecision):
            raise ValueError("a native skeleton stores no matrix as codes")

    def _check_pruning(self) -> None:
        if self.pruning is None:
            return
        if self.pruning.file not in {file.name for file in self.files}:
            raise ValueError("the file of the pruning is not listed")
        if self.shape.top_k < 2:
            raise ValueError("a model of one expert per token has nothing to prune")

    def _check_places(self, records: tuple[ExpertRecord, ...], size_bytes: int) -> None:
        if size_bytes % ALIGNMENT_BYTES:
            raise ValueError("record_size_bytes is not aligned")
        sizes = {file.name: file.size_bytes for file in self.files}
        by_file: dict[str, list[int]] = {}
        for record in records:
            what = f"layer {record.layer} expert {record.expert}"
            if record.file not in sizes:
                raise ValueError(f"{what} lies in an unlisted file")
            if record.offset % ALIGNMENT_BYTES:
                raise ValueError(f"{what} is not aligned")
            if record.offset + size_bytes > sizes[record.file]:
                raise ValueError(f"{what} ends beyond {record.file}")
            by_file.setdefault(record.file, []).append(record.offset)
        for name, offsets in by_file.items():
            offsets.sort()
            for before, after in zip(offsets, offsets[1:], strict=False):
                if after - before < size_bytes:
                    raise ValueError(f"two records overlap in {name}")

    def _check_replicas(self) -> None:
        layers, n_experts = set(self.shape.layers), self.shape.experts
        taken = {record.file for record in self.records}
        for own in self.others:
            files = {record.file for record in own.records}
            if files & taken:
                raise ValueError("a file holds records of two forms")
            taken |= files
        for table in self.replicas:
            if table.is_base:
                self._check_base(table)
                continue
            found = {(record.layer, record.expert) for record in table.records}
            if len(found) != len(table.records) or any(
                layer not in layers or expert >= n_experts for layer, expert in found
            ):
                raise ValueError("a replica is listed twice, or is of no expert of the model")
            files = {record.file for record in table.records}
            if files & taken:
                raise ValueError("a file holds records of two forms")
            taken |= files
            self._check_places(table.records, table.record_size_bytes)

    def _check_choosers(self) -> None:
        """Channels have choosers, of all experts and nothing beside them; nothing else has any."""
        if isinstance(self.precision, ChannelPrecision) != (self.choosers is not None):
            raise ValueError("choosers and channels go together")
        if self.choosers is None:
            return
        if self.replicas or self.others or self.absent:
            raise ValueError("experts in channels have no other forms beside them")
        keys = [(record.layer, record.expert) for record in self.choosers.records]
        if keys != [(record.layer, record.expert) for record in self.records]:
            raise ValueError("the choosers are not those of the experts, in their order")
        if {r.file for r in self.choosers.records} & {r.file for r in self.records}:
            raise ValueError("a file holds records of two forms")
        self._check_places(self.choosers.records, self.choosers.record_size_bytes)

    def _check_base(self, table: ReplicaTable) -> None:
        """Every expert's first bits lie where the expert lies."""
        base = self.precision.base if isinstance(self.precision, IntegerPrecision) else None
        if base != table.precision:
            raise ValueError("first bits of experts that are not nested")
        places = [(r.layer, r.expert, r.file, r.offset) for r in self.records]
        found = [(r.layer, r.expert, r.file, r.offset) for r in table.records]
        if found != places or table.record_size_bytes >= self.record_size_bytes:
            raise ValueError("the first bits of experts do not lie where the experts do")

    def _check_tables(self) -> None:
        tables: dict[str, list[tuple[int, int]]] = {}
        if self.heat is not None:
            tables["heat"] = [(entry.layer, len(entry.load)) for entry in self.heat]
        if self.buddies is not None:
            tables["buddies"] = [(e.layer, len(e.buddies)) for e in self.buddies.layers]
        if self.prices is not None:
            tables["nats"] = [(entry.layer, len(entry.nats)) for entry in self.prices]
            tables["use"] = [(entry.layer, len(entry.use)) for entry in self.prices]
        if self.errors is not None:
            tables["errors"] = [(entry.layer, len(entry.eps)) for entry in self.errors]
        for number, table in enumerate(self.replicas):
            tables[f"replicas {number}"] = [(e.layer, len(e.eps)) for e in table.prices]
        for what, found in tables.items():
            if found != [(layer, self.shape.experts) for layer in self.shape.layers]:
                raise ValueError(f"the {what} table does not fit the model's layers and experts")
