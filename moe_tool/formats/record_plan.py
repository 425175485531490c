"""Records of a bundle: their order and places, and the tables of a manifest that list them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_tool.artifacts.form_table import FormRecord, FormTable
from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.formats.bundle_files import MAX_FILE_BYTES, ExpertFile, record_file_header
from moe_tool.formats.bundle_journal import WrittenRecord
from moe_tool.formats.bundle_spec import BundleSpec, FormPlan
from moe_tool.formats.record_form import RecordForm, record_form
from moe_tool.formats.record_layout import RecordLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPlan:
    """The records of one bundle."""

    tables: tuple[FormPlan, ...]
    """Tables in the manifest's order"""
    forms: tuple[RecordForm[Any], ...]
    """Forms of the tables"""
    base_bytes: tuple[int, ...]
    """Length of the base at the beginning of a record by table; 0 if the table is not nested"""
    order: tuple[tuple[int, int, int], ...]
    """Records in order, (table, layer, expert): all forms of an expert, then the next expert"""
    files: tuple[tuple[ExpertFile, ...], ...]
    """Files by table"""
    places: tuple[tuple[ExpertFile, int], ...]
    """File of each record, and its position there"""

    def form_tables(self, written: Sequence[WrittenRecord]) -> tuple[FormTable, ...]:
        """Return the tables of a manifest, from all records in order."""
        held: list[list[WrittenRecord]] = [[] for _ in self.tables]
        for (at, _, _), record in zip(self.order, written, strict=True):
            held[at].append(record)
        nested: dict[AnyPrecision | None, int] = {
            table.precision.base: at for at, table in enumerate(self.tables) if table.precision.base
        }
        return tuple(
            FormTable(
                role=table.role,
                precision=table.precision,
                record_size_bytes=form.layout.size_bytes,
                records=tuple(
                    map(_first_bits, held[nested[table.precision]])
                    if table.role == "base"
                    else map(_listed, held[at])
                ),
            )
            for at, (table, form) in enumerate(zip(self.tables, self.forms, strict=True))
        )


def plan_records(spec: BundleSpec) -> RecordPlan:
    """Return the records of a bundle; the base of a nested expert has none of its own.

    Raises:
        CorruptArtifactError: channels of a model whose experts have none.
    """
    forms = tuple(record_form(spec.shape, f.precision, f.role) for f in spec.forms)
    pairs = list(zip(spec.forms, forms, strict=True))
    sizes = {(plan.role, plan.precision): form.layout.size_bytes for plan, form in pairs}
    bases = [plan.precision.base for plan in spec.forms]
    wanted = [frozenset() if plan.role == "base" else plan.experts for plan in spec.forms]
    order = [(at, *key) for key in spec.order for at, keys in enumerate(wanted) if key in keys]
    is_alone = sum(plan.role == "primary" for plan in spec.forms) == 1
    files = tuple(
        _expert_files(
            [key for key in spec.order if key in keys],
            form.layout,
            stem=_file_stem(plan, is_alone=is_alone),
        )
        for (plan, form), keys in zip(pairs, wanted, strict=True)
    )
    places = [iter([(f, at) for f in table for at in range(len(f.records))]) for table in files]
    return RecordPlan(
        tables=spec.forms,
        forms=forms,
        base_bytes=tuple(0 if base is None else sizes["base", base] for base in bases),
        order=tuple(order),
        files=files,
        places=tuple(next(places[at]) for at, _, _ in order),
    )


def _expert_files(
    order: Sequence[tuple[int, int]], layout: RecordLayout, *, stem: str
) -> tuple[ExpertFile, ...]:
    """Spread records over files of at most MAX_FILE_BYTES (a larger record gets one to itself)."""
    per_file = max(1, MAX_FILE_BYTES // layout.size_bytes)
    files = []
    for number, start in enumerate(range(0, len(order), per_file), start=1):
        records = tuple(order[start : start + per_file])
        files.append(
            ExpertFile(
                name=f"{stem}-{number:05d}.safetensors",
                header=record_file_header(records, layout),
                records=records,
                record_size_bytes=layout.size_bytes,
            )
        )
    return tuple(files)


def _file_stem(plan: FormPlan, *, is_alone: bool) -> str:
    """Return the beginning of a table's file names; `is_alone`: no other table has its role."""
    stem = {"primary": "experts", "base": "experts"}.get(plan.role, f"{plan.role}s")
    has_name = plan.role == "replica" or not is_alone
    return f"{stem}-{plan.precision.name.replace(':', 'x').replace('+', 'o')}" if has_name else stem


def _listed(record: WrittenRecord) -> FormRecord:
    return FormRecord(**record.model_dump(exclude={"base_xxh3", "base_eps", "parts"}))


def _first_bits(record: WrittenRecord) -> FormRecord:
    """Return a nested expert's base as a record of its own."""
    return _listed(record).model_copy(update={"xxh3": record.base_xxh3, "eps": record.base_eps})
