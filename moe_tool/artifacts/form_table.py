"""Record tables of a bundle: role, form and place of every expert record."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from moe_tool.artifacts.moe_shape import Index, MoeShape
from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.artifacts.schema import FrozenModel

ALIGNMENT_BYTES = 4096
Basename = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=128)]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
SizeBytes = Annotated[int, Field(ge=0, le=2**50)]
Price = Annotated[float, Field(ge=0, le=1e30)]
Role = Literal["primary", "replica", "base", "selector"]
"""primary: the expert itself; replica: a cheaper answer in its place; base: the same, but the first
bits of a nested primary record; selector: the matrix that chooses an expert's channels"""
_RANKS: Mapping[Role, int] = {"primary": 0, "replica": 1, "base": 1, "selector": 2}


class FormRecord(FrozenModel):
    """The place of one form of one expert."""

    layer: Index
    expert: Index
    file: Basename
    offset: SizeBytes
    """Byte offset in the file, a multiple of ALIGNMENT_BYTES"""
    xxh3: Xxh3
    """xxh3-64 of the record's bytes"""
    eps: Price | None = None
    """Error of the form's output relative to the checkpoint's expert, on held-out tokens; None if
    not measured"""


class FormTable(FrozenModel):
    """Records of one role and precision."""

    role: Role
    precision: AnyPrecision
    record_size_bytes: Annotated[int, Field(ge=ALIGNMENT_BYTES, le=2**40)]
    """Size of each record, a multiple of ALIGNMENT_BYTES"""
    records: tuple[FormRecord, ...]
    """Records in file order, at most one per expert"""

    @property
    def name(self) -> str:
        """Name of the precision, as in the options of `pack`"""
        return self.precision.name

    @property
    def size_bytes(self) -> int:
        """Size of all records together"""
        return len(self.records) * self.record_size_bytes

    @property
    def experts(self) -> frozenset[tuple[int, int]]:
        """Keys of the experts with a record, as (layer, expert)"""
        return frozenset((record.layer, record.expert) for record in self.records)


def check_form_tables(
    tables: Sequence[FormTable],
    removed: Sequence[tuple[int, int]],
    shape: MoeShape,
    file_sizes: Mapping[str, int],
) -> None:
    """Refuse a bundle's tables that contradict each other, the model or the files.

    Raises:
        ValueError: the first contradiction.
    """
    ranks = [_RANKS[table.role] for table in tables]
    if ranks != sorted(ranks):
        raise ValueError("the forms are not in the order primary, cheaper, selector")
    if len({(table.role, table.precision) for table in tables}) < len(tables):
        raise ValueError("two tables hold the same form")
    for table in tables:
        if table.role not in table.precision.roles:
            raise ValueError(f"{table.name} is no form for the role {table.role}")
    _check_experts(tables, removed, shape)
    _check_files(tables, file_sizes)
    _check_bases(tables)
    _check_selectors(tables)


def _check_experts(
    tables: Sequence[FormTable], removed: Sequence[tuple[int, int]], shape: MoeShape
) -> None:
    """Require every expert in one primary table or removed, and no removed one in other tables."""
    layers = set(shape.layers)
    primary = [(r.layer, r.expert) for t in tables if t.role == "primary" for r in t.records]
    found = {*primary, *removed}
    # Counted first: a damaged number of experts must not become a set of that size.
    if (
        len(primary) + len(removed) != len(layers) * shape.experts
        or len(found) != len(primary) + len(removed)
        or any(layer not in layers or expert >= shape.experts for layer, expert in found)
    ):
        raise ValueError("the primary tables do not hold every expert exactly once")
    if not primary:
        raise ValueError("every expert was removed")
    stored = set(primary)
    for table in tables:
        experts = table.experts
        if len(experts) < len(table.records) or not experts <= stored:
            raise ValueError(
                f"the {table.role} {table.name} lists an expert twice, or one that is not stored"
            )


def _check_files(tables: Sequence[FormTable], file_sizes: Mapping[str, int]) -> None:
    """Require that no two tables share a file, except bases, which lie in the primary's records."""
    taken: set[str] = set()
    for table in tables:
        files = {record.file for record in table.records} if table.role != "base" else set()
        if files & taken:
            raise ValueError("a file holds records of two forms")
        taken |= files
        _check_places(table, file_sizes)


def _check_places(table: FormTable, file_sizes: Mapping[str, int]) -> None:
    size_bytes = table.record_size_bytes
    if size_bytes % ALIGNMENT_BYTES:
        raise ValueError("record_size_bytes is not aligned")
    by_file: dict[str, list[int]] = {}
    for record in table.records:
        what = f"layer {record.layer} expert {record.expert}"
        if record.file not in file_sizes:
            raise ValueError(f"{what} lies in an unlisted file")
        if record.offset % ALIGNMENT_BYTES:
            raise ValueError(f"{what} is not aligned")
        if record.offset + size_bytes > file_sizes[record.file]:
            raise ValueError(f"{what} ends beyond {record.file}")
        by_file.setdefault(record.file, []).append(record.offset)
    for name, offsets in by_file.items():
        offsets.sort()
        for before, after in zip(offsets, offsets[1:], strict=False):
            if after - before < size_bytes:
                raise ValueError(f"two records overlap in {name}")


def _check_bases(tables: Sequence[FormTable]) -> None:
    """Require one base table per nested table, whose records start where the nested ones do."""
    nested: dict[AnyPrecision | None, FormTable] = {
        t.precision.base: t for t in tables if t.role == "primary" and t.precision.base
    }
    bases = {t.precision: t for t in tables if t.role == "base"}
    if nested.keys() != bases.keys():
        raise ValueError("tables of first bits and of nested experts go together")
    for precision, base in bases.items():
        whole = nested[precision]
        places = [(r.layer, r.expert, r.file, r.offset) for r in whole.records]
        found = [(r.layer, r.expert, r.file, r.offset) for r in base.records]
        if found != places or base.record_size_bytes >= whole.record_size_bytes:
            raise ValueError("the first bits of experts do not lie where the experts do")


def _check_selectors(tables: Sequence[FormTable]) -> None:
    """Require one selector table per table in channels, with the same experts in the same order."""
    wanted = {
        t.precision: t for t in tables if t.role == "primary" and "selector" in t.precision.roles
    }
    selectors = {t.precision: t for t in tables if t.role == "selector"}
    if wanted.keys() != selectors.keys():
        raise ValueError("selectors and channels go together")
    for precision, table in selectors.items():
        keys = [(record.layer, record.expert) for record in table.records]
        if keys != [(record.layer, record.expert) for record in wanted[precision].records]:
            raise ValueError("the selectors are not those of the experts, in their order")
