"""Replica answers: a missing expert is read in full, in a cheaper form, or dropped, by its rank."""

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing, keep, leave_out
from moe_tool.errors import UsageError
from moe_tool.policies.misses.needs import REPLICAS
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs, read_quantile
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.strength import share_strength
from moe_tool.policies.parameters import Parameter, whole_number


class Replica(MissPolicy):
    """HOBBIT's scorer (arXiv:2411.01433): the unimportance s of a slot is the normalised gate
    weight of all slots above it, 0 for the heaviest.

    A missing expert with s <= t1 is fetched in full, with s <= t2 in its cheaper form (in full
    without one), else it is dropped. Resident primary forms are used. The heaviest slot is always
    answered in full, so that at least one slot of K is, whatever share is asked for. The paper has
    one t1 and t2 for a model; here every layer has its own, at which it has the asked shares.
    Experts predicted for a coming layer are prefetched by the same rule, of their predicted s.
    """

    chooses_prefetches = True

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        self.form, n_forms = int(values["form"]), len(inputs.forms)
        if self.form >= n_forms:
            raise UsageError(
                f"--policy replica: there is no form {self.form}",
                hint=f"the bundle has replicas 1 to {n_forms - 1}: {', '.join(inputs.forms[1:])}",
            )
        self.stored = inputs.stored
        self._shares = values["high"], min(1.0, values["high"] + values["low"])
        self._limits = {
            layer: (threshold(table, self._shares[0]), threshold(table, self._shares[1]))
            for layer, table in inputs.unimportance.items()
        }

    def describe(self) -> str:
        pairs = tuple(self._limits.values()) or (self._shares,)
        first, second = (_range(limits) for limits in zip(*pairs, strict=True))
        return (
            "replica: a missing expert that matters less is answered by its cheaper form or left "
            f"out, text may differ (T1 {first}, T2 {second})"
        )

    def limits(self, layer: int) -> tuple[float, float]:
        """Return T1 and T2 of a decoder layer; without a profile they are the shares themselves."""
        return self._limits.get(layer, self._shares)

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        if resident[PRIMARY].all():
            return keep(routing)
        s = unimportance(routing.weight)
        t1, t2 = self.limits(routing.layer)
        missing = routing.present & ~resident[PRIMARY][routing.index]
        is_low = missing & (s > t1) & (s <= t2)
        if self.stored:
            is_low &= self.stored[routing.layer][self.form][routing.index]
        is_left_out = missing & (s > t1) & (s > t2)
        return leave_out(routing, is_left_out, np.where(is_low, self.form, PRIMARY))


def threshold(table: np.ndarray, share: float) -> float:
    """Return the limit t at which the part of a layer's slots with s <= t is closest to `share`.

    Args:
        table: quantiles of s at equally spaced shares. Many slots may have the same s: the
            heaviest ones have 0. Such an s counts as a whole, on the side that is closer, and
            0 always counts.
        share: 0 to 1; 1 admits every slot, also where its s is above all of the profile.
    """
    if share >= 1.0:
        return 1.0
    value = read_quantile(table, share)
    same = np.flatnonzero(table == value) / (len(table) - 1)
    if len(same) > 1 and value > 0.0 and share - same[0] < same[-1] - share:
        return float(np.nextafter(value, 0.0))
    return value


def _range(values: tuple[float, ...]) -> str:
    least, most = f"{min(values):.3g}", f"{max(values):.3g}"
    return least if least == most else f"{least} to {most} by layer"


def unimportance(weight: np.ndarray) -> np.ndarray:
    """Return the share of the token's gate weight in slots heavier than each slot, [T, K] float64
    in 0..1; 0 for the heaviest."""
    order = np.argsort(-weight, axis=1, kind="stable")
    ranked = np.take_along_axis(weight.astype(np.float64), order, axis=1)
    total = ranked.sum(axis=1, keepdims=True)
    before = np.cumsum(ranked, axis=1) - ranked
    share = np.divide(before, total, out=np.zeros_like(before), where=total > 0)
    result: np.ndarray = np.empty_like(share)
    np.put_along_axis(result, order, share, axis=1)
    return result


SPEC = PolicySpec(
    name="replica",
    summary="itself in full, in a cheaper form, or nothing, by how much gate weight lies above its "
    "slot",
    make=Replica,
    inert="high=1",
    fires="high=0.3,low=0.5",
    parameters={
        "high": Parameter(
            help="share of slots, by the profile, that is read in full", default=0.67
        ),
        "low": Parameter(help="share of slots that is answered in the cheaper form", default=0.3),
        "form": whole_number(
            "the cheaper form: 1 for the first of `pack --replicas`", default=1, most=64
        ),
        "part": Parameter(help="share of the memory that cheaper forms get", default=0.2),
    },
    needs=(REPLICAS,),
    residents="two-precisions",
    strength=share_strength("high", falls=True),
    source="HOBBIT, arXiv:2411.01433",
)
