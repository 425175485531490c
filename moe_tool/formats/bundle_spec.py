"""Specification of a bundle: the model, which experts get which forms, options and inputs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.form_table import FormTable, Role
from moe_tool.artifacts.identity import ModelIdentity, require_same_model
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import AnyPrecision, ExpertPrecision, ReplicaPrecision
from moe_tool.errors import UsageError
from moe_tool.formats.hostile_file import quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class FormPlan:
    """One table of a bundle before it is written."""

    role: Role
    precision: AnyPrecision
    experts: frozenset[tuple[int, int]]
    """Experts with a record, (layer, expert)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSpec:
    """Planned contents of a bundle, and what it is made from."""

    identity: ModelIdentity
    shape: MoeShape
    order: tuple[tuple[int, int], ...]
    """Experts in file order, (layer, expert), removed ones included"""
    forms: tuple[FormPlan, ...]
    """Tables in the manifest's order, see `planned_forms`"""
    removed: frozenset[tuple[int, int]] = frozenset()
    placed: frozenset[int] = frozenset()
    """Positions of the tables whose records stay in the checkpoint's files"""
    made_from: Mapping[str, str]
    """Options and input hashes; a bundle or part of one with others is refused"""

    @property
    def options(self) -> dict[str, str]:
        """Everything that has to be the same for a resume, by name"""
        return {"forms": _named(self.forms), **self.made_from}

    def require_same_bundle(self, folder: Path, found: BundleManifest) -> None:
        """Refuse a finished bundle of another specification.

        Raises:
            WrongModelError, UsageError: name what was found and what is wanted.
        """
        options = {"forms": _named(found.forms), **found.made_from}
        self.require_same(folder, found.identity, options)

    def require_same(
        self, folder: Path, identity: ModelIdentity, options: Mapping[str, str]
    ) -> None:
        """Refuse a folder that was begun for another model or with other options; see
        `require_same_inputs`."""
        require_same_inputs(folder, identity, options, wanted=self)


class Inputs(Protocol):
    """Model and options that a bundle of any kind is made from."""

    @property
    def identity(self) -> ModelIdentity:
        """The model"""

    @property
    def options(self) -> dict[str, str]:
        """Everything that has to be the same for a resume, by name"""

    def require_same(
        self, folder: Path, identity: ModelIdentity, options: Mapping[str, str]
    ) -> None:
        """Refuse other inputs; see `require_same_inputs`."""


def require_same_inputs(
    folder: Path, identity: ModelIdentity, options: Mapping[str, str], *, wanted: Inputs
) -> None:
    """Refuse a folder that was begun for another model or with other options.

    Raises:
        WrongModelError, UsageError: name what was found and what is wanted.
    """
    remedy = f"choose another --out, or remove {folder}"
    require_same_model(identity, wanted.identity, artifact=f"the bundle {folder}", remedy=remedy)
    names = options.keys() | wanted.options.keys()
    for key in sorted(names, key=lambda name: (name == "forms", name)):  # they follow from all
        old, new = options.get(key, "none"), wanted.options.get(key, "none")
        if old != new:
            raise UsageError(
                f"{folder} was packed with {key} {quoted(old)}, now {quoted(new)} is asked for",
                hint=f"give the same options and artifacts as then (without --profile and "
                f"--buddies the newest of the model are taken), {remedy}",
            )


def planned_forms(
    primaries: Mapping[ExpertPrecision, Collection[tuple[int, int]]],
    replicas: Mapping[ReplicaPrecision, Collection[tuple[int, int]]] | None = None,
) -> tuple[FormPlan, ...]:
    """Return the tables of a bundle in the manifest's order: primaries, the most bits first; then
    replicas and bases, the dearest first; then channel selectors.

    Args:
        primaries: precision -> (layer, expert) of its experts.
        replicas: precision -> (layer, expert) of the experts with such a replica.
    """
    return (
        *_tables("primary", primaries),
        *sorted(
            (
                *_tables("base", {p.base: keys for p, keys in primaries.items() if p.base}),
                *_tables("replica", replicas or {}),
            ),
            key=_by_cost,
        ),
        *_tables("selector", {p: k for p, k in primaries.items() if "selector" in p.roles}),
    )


def _tables(role: Role, experts: Mapping[Any, Collection[tuple[int, int]]]) -> list[FormPlan]:
    plans = [FormPlan(role=role, precision=p, experts=frozenset(k)) for p, k in experts.items()]
    return sorted(plans, key=_by_cost)


def _by_cost(plan: FormPlan) -> tuple[tuple[int, int, int], str]:
    return plan.precision.order_key, plan.precision.name


def _named(forms: Sequence[FormPlan] | Sequence[FormTable]) -> str:
    return ", ".join(f"{form.role} {form.precision.name}" for form in forms)
