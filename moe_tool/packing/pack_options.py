"""Options of `pack`, parsed once."""

from dataclasses import dataclass
from pathlib import Path

from moe_tool.artifacts.pack_plan import PackPlan, Quantizer
from moe_tool.artifacts.precision import (
    ChannelPrecision,
    NativePrecision,
    Precision,
    ReplicaPrecision,
    channel_precision,
    precision_from_bits,
    replica_precisions,
)
from moe_tool.budget.sizes import parse_bytes
from moe_tool.budget.table_choice import AUTO_ROWS, RowsRequest, parse_rows
from moe_tool.errors import UsageError
from moe_tool.quantizers.registry import parse_quantizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """Options of a pack; zero points follow from the quantizer."""

    out: Path
    """Folder of the bundle; until it is finished its name ends in `.part`"""
    bits: Precision | None = NativePrecision()
    """Primary precision of every expert; None: mixed, as the plan says"""
    skeleton: Precision = NativePrecision()
    """Precision of the matrices outside experts and routers"""
    replicas: tuple[ReplicaPrecision, ...] = ()
    """Cheaper forms of experts, for lossy policies, the dearest first"""
    channels: ChannelPrecision | None = None
    """Precision of experts in channels; None: experts are whole"""
    quantizer: Quantizer = "rtn"
    plan: PackPlan | None = None
    """Plan for the manifest, which `run` follows"""
    robust: float = 0.0
    """Share of the worst case over domains in the use that residents are chosen by, 0 to 1"""
    in_place: bool = False
    """Whether records that the checkpoint's files hold stay there"""
    discard_source: bool = False
    """Whether downloaded shards are deleted once they are packed"""
    rows: RowsRequest = AUTO_ROWS
    """Embedding tables that stay out of memory, now and by default in a run"""
    memory_bytes: int | None = None
    """Budget of the whole process; None: no limit"""

    @property
    def bits_name(self) -> str:
        """Primary precision as `--bits` takes it"""
        return "mixed" if self.bits is None else self.bits.name

    @property
    def primary_option(self) -> str:
        """Option and value that set the primary precision"""
        if self.channels is not None:
            return f"--sparse-experts {self.channels.name}"
        return f"--bits {self.bits_name}"

    @property
    def replica_names(self) -> str:
        """Replicas as `--replicas` takes them"""
        return ",".join(each.name for each in self.replicas)


def parse_pack_options(
    *,
    out: Path,
    bits: str | None = None,
    skeleton_bits: str | None = None,
    replicas: str | None = None,
    sparse_experts: str | None = None,
    quantizer: Quantizer | None = None,
    plan: PackPlan | None = None,
    robust: float | None = None,
    in_place: bool = False,
    discard_source: bool = False,
    rows: str = "auto",
    memory: str | None = None,
) -> PackOptions:
    """Return the options for words of the command line; None: as the plan says, or the default.

    Raises:
        UsageError: a word is unknown.
    """
    if in_place and discard_source:
        raise UsageError(
            "--discard-source beside --in-place, which needs the checkpoint",
            hint="leave one of them out",
        )
    if robust is not None and not 0 <= robust <= 1:
        raise UsageError(f"--robust {robust:g}: not possible", hint="--robust 0.5")
    if plan is not None:
        bits, skeleton_bits = bits or plan.bits, skeleton_bits or plan.skeleton_bits
        quantizer = quantizer or plan.quantizer
        replicas = plan.replicas if replicas is None else replicas
        robust = plan.robust if robust is None else robust
    return PackOptions(
        out=out,
        bits=None if bits == "mixed" else parse_precision("--bits", bits or "native"),
        skeleton=_skeleton(skeleton_bits or "native"),
        replicas=_replicas(replicas or ""),
        channels=_channels(sparse_experts, bits) if sparse_experts else None,
        quantizer=parse_quantizer(quantizer or "rtn").name,
        plan=plan,
        robust=robust or 0.0,
        in_place=in_place,
        discard_source=discard_source,
        rows=parse_rows(rows),
        memory_bytes=None if memory is None else parse_bytes(memory),
    )


def parse_precision(option: str, bits: str) -> Precision:
    """Return the precision that an option names.

    Raises:
        UsageError: it is unknown; the hint lists the known ones.
    """
    try:
        return precision_from_bits(bits)
    except ValueError:
        raise UsageError(
            f"{option} {bits} is not known", hint="use native, 8, 4, 3, 2, 1, 2:128 or 2+2"
        ) from None


def _skeleton(bits: str) -> Precision:
    found = parse_precision("--skeleton-bits", bits)
    if found.base is not None:
        raise UsageError(
            f"--skeleton-bits {bits}: only experts are nested", hint="--skeleton-bits 4"
        )
    return found


def _replicas(text: str) -> tuple[ReplicaPrecision, ...]:
    try:
        return replica_precisions(text)
    except ValueError:
        raise UsageError(
            f"--replicas {text} is not known",
            hint="name widths of 8, 4, 3, 2 or 1 bits, and ranks: --replicas 3,2:128,rank16",
        ) from None


def _channels(name: str, bits: str | None) -> ChannelPrecision:
    try:
        found = channel_precision(name)
    except ValueError:
        raise UsageError(
            f"--sparse-experts {name} is not known",
            hint="use up2, up3, gate2 or gate3; gate2:8 has channels of 8 bits instead of 4",
        ) from None
    if bits not in (None, "native"):
        raise UsageError(
            f"--bits {bits} beside --sparse-experts {name}: the latter has the bits of all parts",
            hint=f"--sparse-experts {found.selected_by}{found.selector_bits}:8",
        )
    return found
