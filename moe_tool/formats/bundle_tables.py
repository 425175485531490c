"""Convert written records to the tables of a manifest."""

from collections.abc import Iterable, Sequence

from moe_tool.artifacts.form_table import FormRecord, FormTable
from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.formats.bundle_journal import WrittenRecord
from moe_tool.formats.bundle_spec import FormPlan


def form_tables(
    plans: Sequence[FormPlan],
    sizes: Sequence[int],
    written: Iterable[tuple[int, WrittenRecord]],
) -> tuple[FormTable, ...]:
    """Return the tables of all records of a bundle.

    Args:
        plans: of the bundle's tables.
        sizes: bytes of a record of each.
        written: (position of its table, record), in file order; first bits have none of their own.
    """
    records: list[list[WrittenRecord]] = [[] for _ in plans]
    for form, record in written:
        records[form].append(record)
    nested: dict[AnyPrecision | None, int] = {
        plan.precision.base: at for at, plan in enumerate(plans) if plan.precision.base
    }
    return tuple(
        FormTable(
            role=plan.role,
            precision=plan.precision,
            record_size_bytes=size,
            records=tuple(
                map(_first_bits, records[nested[plan.precision]])
                if plan.role == "base"
                else map(_listed, records[form])
            ),
        )
        for form, (plan, size) in enumerate(zip(plans, sizes, strict=True))
    )


def _listed(record: WrittenRecord) -> FormRecord:
    return FormRecord(**record.model_dump(exclude={"base_xxh3", "base_eps"}))


def _first_bits(record: WrittenRecord) -> FormRecord:
    """Return a nested expert's base as a record of its own."""
    return _listed(record).model_copy(update={"xxh3": record.base_xxh3, "eps": record.base_eps})
