"""Records of a bundle: their order and places."""

from dataclasses import dataclass
from typing import Any

from moe_tool.formats.bundle_files import ExpertFile, file_stem, plan_expert_files, record_places
from moe_tool.formats.bundle_spec import BundleSpec
from moe_tool.formats.record_form import RecordForm, record_form


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPlan:
    """The records of one bundle."""

    forms: tuple[RecordForm[Any], ...]
    """Forms of the tables, in the manifest's order"""
    base_bytes: tuple[int, ...]
    """Length of the base at the beginning of a record by table; 0 if the table is not nested"""
    order: tuple[tuple[int, int, int], ...]
    """Records in order, (table, layer, expert): all forms of an expert, then the next expert"""
    files: tuple[tuple[ExpertFile, ...], ...]
    """Files by table"""
    places: tuple[tuple[ExpertFile, int], ...]
    """File of each record, and its position there"""


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
        plan_expert_files(
            [key for key in spec.order if key in keys],
            form.layout,
            stem=file_stem(plan.role, plan.precision, is_alone=is_alone),
        )
        for (plan, form), keys in zip(pairs, wanted, strict=True)
    )
    return RecordPlan(
        forms=forms,
        base_bytes=tuple(0 if base is None else sizes["base", base] for base in bases),
        order=tuple(order),
        files=files,
        places=tuple(record_places(order, files)),
    )
