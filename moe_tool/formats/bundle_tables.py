"""Written records as the tables of a manifest."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_tool.artifacts.bundle_manifest import (
    ChooserTable,
    ExpertRecord,
    OwnTable,
    ReplicaLayer,
    ReplicaTable,
)
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import IntegerPrecision, Precision, ReplicaPrecision
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.formats.bundle_journal import WrittenRecord
from moe_tool.formats.expert_form import AnyForm


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordTables:
    """Fields of a manifest of the same names."""

    records: tuple[ExpertRecord, ...]
    replicas: tuple[ReplicaTable, ...]
    others: tuple[OwnTable, ...]
    choosers: ChooserTable | None
    errors: tuple[ReplicaLayer, ...] | None


def record_tables(
    shape: MoeShape,
    forms: Sequence[AnyForm],
    by_level: Sequence[Sequence[WrittenRecord]],
    *,
    replicas: Sequence[ReplicaPrecision],
    others: Sequence[Precision],
) -> RecordTables:
    """Return the tables of all records of a bundle.

    Args:
        shape: of the model.
        forms: by level: PRIMARY, replicas, others, at last what chooses channels, if anything does.
        by_level: the records, in file order; none of a base, which lies in the PRIMARY ones.
        replicas: precisions of their levels.
        others: precisions of theirs.
    """
    first_other = 1 + len(replicas)
    end_others = first_other + len(others)
    held = [
        [_first_bits(record) for record in by_level[PRIMARY]] if _is_base(form) else records
        for form, records in zip(forms, by_level, strict=True)
    ]
    measured = [r for level in (PRIMARY, *range(first_other, end_others)) for r in held[level]]
    is_measured = any(record.eps is not None for record in measured)
    return RecordTables(
        records=_listed(held[PRIMARY]),
        replicas=tuple(
            ReplicaTable(
                precision=precision,
                record_size_bytes=forms[level].layout.size_bytes,
                records=_listed(held[level]),
                prices=_errors(shape, held[level]),
            )
            for level, precision in enumerate(replicas, start=1)
        ),
        others=tuple(
            OwnTable(
                precision=precision,
                record_size_bytes=forms[level].layout.size_bytes,
                records=_listed(held[level]),
            )
            for level, precision in enumerate(others, start=first_other)
        ),
        choosers=ChooserTable(
            record_size_bytes=forms[end_others].layout.size_bytes,
            records=_listed(held[end_others]),
        )
        if len(forms) > end_others
        else None,
        errors=_errors(shape, measured) if is_measured else None,
    )


def _errors(shape: MoeShape, records: Sequence[WrittenRecord]) -> tuple[ReplicaLayer, ...]:
    """What was measured of one form; 1 where nothing was."""
    found = {(r.layer, r.expert): r.eps for r in records if r.eps is not None}
    return tuple(
        ReplicaLayer(
            layer=layer, eps=tuple(found.get((layer, e), 1.0) for e in range(shape.experts))
        )
        for layer in shape.layers
    )


def _listed(records: Sequence[WrittenRecord]) -> tuple[ExpertRecord, ...]:
    """As a manifest has them."""
    extra = WrittenRecord.model_fields.keys() - ExpertRecord.model_fields.keys()
    return tuple(ExpertRecord(**each.model_dump(exclude=extra)) for each in records)


def _is_base(form: AnyForm) -> bool:
    precision = form.precision
    return isinstance(precision, IntegerPrecision) and precision.of_bits is not None


def _first_bits(record: WrittenRecord) -> WrittenRecord:
    """A nested expert's base, as a record of its own."""
    return record.model_copy(update={"xxh3": record.base_xxh3, "eps": record.base_eps})
