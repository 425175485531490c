"""Check of a plan against the options and the model, and the forms that it wants packed."""

from collections.abc import Sequence

from moe_tool.artifacts.identity import ModelIdentity, require_same_model
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.artifacts.precision import ReplicaPrecision
from moe_tool.errors import UsageError
from moe_tool.packing.pack_options import PackOptions
from moe_tool.policies.eviction import parse_eviction


def require_plan_fits(
    options: PackOptions, plan: PackPlan, identity: ModelIdentity, *, has_heat: bool
) -> None:
    """Refuse a plan of another model, or options that it was not made for.

    Raises:
        WrongModelError, UsageError: the hint says what to do.
    """
    require_same_model(
        plan.identity,
        identity,
        artifact="the plan",
        remedy=f"moe-tool plan on a profile of {identity.name}",
    )
    asked = (options.bits_name, options.skeleton.name)
    if asked != (plan.bits, plan.skeleton_bits):
        raise UsageError(
            f"the plan is for --bits {plan.bits} --skeleton-bits {plan.skeleton_bits}, not for "
            f"{asked[0]} and {asked[1]}",
            hint="leave the bits to the plan, or plan again with these",
        )
    if parse_eviction(plan.eviction).spec.pinned_share and not has_heat:
        raise UsageError(
            f"the plan's {plan.eviction} pins the experts that a profile found hot, and there is "
            "no profile",
            hint="--profile FILE, the one that the plan was made from",
        )
    packed = {"", *options.replica_names.split(",")}
    missing = [word for word in plan.replicas.split(",") if word not in packed]
    if missing:
        raise UsageError(
            f"the plan's policy answers with replicas of {', '.join(missing)} bits, which "
            f"--replicas {options.replica_names or 'none'} leaves out",
            hint="leave --replicas to the plan",
        )


def planned_residents(
    plan: PackPlan, forms: Sequence[ReplicaPrecision]
) -> dict[str, frozenset[tuple[int, int]]] | None:
    """Return the experts that a plan wants each form of, by the form's name; None: all experts.

    If no miss is read, a form that is not in memory is of no use on the disk.
    """
    if plan.policy is None or any(form.n_disk_only for form in plan.forms[1:]):
        return None
    residents = {form.precision: frozenset(form.resident) for form in plan.forms}
    if not {form.name for form in forms} <= residents.keys():
        return None  # more replicas were asked for than are planned
    return residents
