"""Convert written records to the tables of a manifest."""

from collections.abc import Sequence

from moe_tool.artifacts.form_table import FormRecord, FormTable
from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.formats.bundle_journal import WrittenRecord
from moe_tool.formats.bundle_spec import FormPlan
from moe_tool.formats.record_plan import RecordPlan


def form_tables(
    plans: Sequence[FormPlan], records: RecordPlan, written: Sequence[WrittenRecord]
) -> tuple[FormTable, ...]:
    """Return the tables of a bundle; `written` are its records in the order of `records`."""
    held: list[list[WrittenRecord]] = [[] for _ in plans]
    for (form, _, _), record in zip(records.order, written, strict=True):
        held[form].append(record)
    nested: dict[AnyPrecision | None, int] = {
        plan.precision.base: at for at, plan in enumerate(plans) if plan.precision.base
    }
    return tuple(
        FormTable(
            role=plan.role,
            precision=plan.precision,
            record_size_bytes=records.forms[form].layout.size_bytes,
            records=tuple(
                map(_first_bits, held[nested[plan.precision]])
                if plan.role == "base"
                else map(_listed, held[form])
            ),
        )
        for form, plan in enumerate(plans)
    )


def _listed(record: WrittenRecord) -> FormRecord:
    return FormRecord(**record.model_dump(exclude={"base_xxh3", "base_eps"}))


def _first_bits(record: WrittenRecord) -> FormRecord:
    """Return a nested expert's base as a record of its own."""
    return _listed(record).model_copy(update={"xxh3": record.base_xxh3, "eps": record.base_eps})
