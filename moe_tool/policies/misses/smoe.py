"""SMoE's answers: near-ties first; misses that are left are read or answered by replicas."""

from dataclasses import replace

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing
from moe_tool.errors import UsageError
from moe_tool.policies.misses.near_tie import BAND_PARAMETERS, NearTie
from moe_tool.policies.misses.needs import REPLICAS, WEIGHT_RULE
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.parameters import Parameter, whole_number
from moe_tool.policies.two_pointers import count_reads


class Smoe(MissPolicy):
    """SMoE's router and its division of misses by two pointers (arXiv:2508.18983).

    After near-ties, a token's missing experts are divided by score: the best are read, the others
    answered by their resident replica, so that both ways take about as long.
    Deviations: with one place to compute, replicas stand for the experts that the paper computes
    where they lie, so that these answers differ from exact; each token's misses are divided alone,
    and costs are given, so that an answer depends on nothing but routing and residency. With
    `measured` the costs are running means as published, and the text depends on timing.
    """

    needs_router = "scores"

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        self.form, n_forms = int(values["form"]), len(inputs.forms)
        if self.form >= n_forms:
            raise UsageError(
                f"--policy smoe: there is no form {self.form}",
                hint=f"the bundle has replicas 1 to {n_forms - 1}: {', '.join(inputs.forms[1:])}",
            )
        self.bands = NearTie(inputs, {**values, "batch": 0})
        self.costs_ms = values["read-ms"], values["replica-ms"]
        self.needs_costs = bool(values["measured"])

    def describe(self) -> str:
        read_ms, replica_ms = self.costs_ms
        costs = f"{read_ms:g} ms for a read, {replica_ms:g} ms for a replica"
        if self.needs_costs:
            costs += "; by measured times once there are some: the text depends on timing"
        return (
            "smoe: a missing expert is answered by one that scored nearly as high, is read, or is "
            f"answered by its replica in memory, text may differ (bands {self.bands.alpha:.0%}, "
            f"{costs})"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        answers = self.bands.decide(routing, resident)
        is_missing = routing.present & (answers.expert == routing.index)
        is_missing &= ~resident[PRIMARY][routing.index]
        is_free = is_missing & resident[self.form][routing.index]
        if not is_free.any():
            return answers
        costs_ms = self.costs_ms if routing.costs_ms is None else routing.costs_ms
        n_reads = _table(routing.index.shape[1], *costs_ms)[
            is_free.sum(axis=1), (is_missing & ~is_free).sum(axis=1)
        ]
        assert routing.score is not None, "the policy asked for it"
        own = np.take_along_axis(routing.score, routing.index, axis=1)  # [T, K]
        order = np.argsort(np.where(is_free, -own, np.inf), axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
        by_replica = is_free & (rank >= n_reads[:, None])
        return replace(answers, form=np.where(by_replica, self.form, answers.form))


def _table(top_k: int, read: float, other: float) -> np.ndarray:
    """Return how many experts are read, [free, forced] from 0 to K each, at two costs."""
    sizes = range(top_k + 1)
    return np.array(
        [
            [count_reads([read] * n, [other] * n, begun=forced * read) for forced in sizes]
            for n in sizes
        ]
    )


SPEC = PolicySpec(
    name="smoe",
    summary="in a near-tie, a resident expert that was nearly chosen; else itself where it "
    "scored high, or its replica in memory, so that reads and replicas take as long",
    make=Smoe,
    inert="alpha=0,read-ms=0",
    fires="alpha=1",
    parameters=BAND_PARAMETERS
    | {
        "read-ms": Parameter(
            help="milliseconds to read an expert; 0: all are read", default=1, most=10**6
        ),
        "replica-ms": Parameter(help="milliseconds to compute a replica", default=0.25, most=10**6),
        "measured": whole_number(
            "1: running means of measured times take the place of both, as published; the text "
            "depends on timing then",
            default=0,
            most=1,
            least=0,
        ),
        "form": whole_number(
            "the replica: 1 for the first of `pack --replicas`", default=1, most=64
        ),
        "part": Parameter(help="share of the memory that replicas get", default=0.2),
    },
    needs=(WEIGHT_RULE, REPLICAS),
    residents="beside-replicas",
    source="SMoE, arXiv:2508.18983",
)
