"""Priced answers: a missing expert is answered by whatever is expected to cost least."""

import math

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing, keep
from moe_tool.policies.misses.needs import PRICES
from moe_tool.policies.misses.price_book import LayerBook
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs, as_shares
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.strength import Strength, price_grid
from moe_tool.policies.parameters import Parameter

_SELF, _NOTHING = -1, -2


class Priced(MissPolicy):
    """Answers every missing expert with the least price + nats per MB * bytes to read.

    Candidates: a cheaper form, resident or read; a listed resident stand-in with its scale;
    nothing; the expert itself, read from the bundle. The cost of a read follows from its bytes,
    never from a clock, and a token is charged for its own reads alone, so that its answers do not
    depend on the batch. Slots are answered in descending gate weight, and a token uses no stand-in
    twice.

    Slots best answered by a stand-in or nothing are re-routed together instead, to the residents
    that the router ranks next, weighed by the model's rule, if the router's scores of the new set
    are at least a share `reroute` of the wanted set's: near-ties of this token, which no list of
    stand-ins has.
    """

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.prices is not None
        self.book, self.nats_per_mb = inputs.prices, values["nats-per-mb"]
        self.reroute, self.reweigh = values["reroute"], inputs.reweigh
        self.scores_are_logits = inputs.scores_are_logits
        self.needs_router = "nothing" if self.reweigh is None or self.reroute > 1 else "scores"

    def describe(self) -> str:
        if math.isinf(self.nats_per_mb):
            price = "nothing is read for a miss"
        else:
            price = f"a read of 1 MB is worth {self.nats_per_mb:.3g} nats"
        return f"priced: the cheapest answer to a missing expert, text may differ ({price})"

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        if resident[PRIMARY].all() or self.nats_per_mb == 0:
            return keep(routing)
        book = self.book.layers[routing.layer]
        form, column = self._cheapest(book, routing, resident)
        expert, weight = routing.index.copy(), routing.weight.astype(np.float32)
        token, position = np.nonzero(column >= 0)
        wanted, listed = routing.index[token, position], column[token, position]
        expert[token, position] = book.buddy[wanted, listed]
        weight[token, position] *= book.buddy_scale[wanted, listed].astype(np.float32)
        present = routing.present & (column != _NOTHING)
        weight[column == _NOTHING] = 0
        answers = Answers(expert=expert, present=present, weight=weight, form=form)
        if self.needs_router == "scores":
            self._reroute(routing, resident, column != _SELF, answers)
        return answers

    def _cheapest(
        self, book: LayerBook, routing: Routing, resident: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the form of the wanted expert that answers each slot, [T, K], and the listed
        stand-in that does, _SELF for none and _NOTHING for a dropped slot, [T, K]."""
        n_tokens, top_k = routing.index.shape
        n_forms, n_experts = resident.shape
        form = np.full(routing.index.shape, PRIMARY)
        column = np.full(routing.index.shape, _SELF)
        every = np.arange(n_tokens)
        used = routing.is_wanted(n_experts)
        missing = routing.present & ~resident[PRIMARY][routing.index]
        with np.errstate(invalid="ignore"):  # inf * 0 bytes of a form that is not stored
            reading = np.where(resident, 0.0, self.nats_per_mb * book.record_bytes / 1e6)  # [F, E]
        extra = np.where(np.isfinite(book.eps), reading, np.inf)
        squared = np.where(np.isfinite(book.eps), book.eps, 0.0) ** 2  # [F, E]
        order = np.argsort(-routing.weight, axis=1, kind="stable")
        for rank in range(top_k):
            position = order[:, rank]
            token = np.flatnonzero(missing[every, position])
            if not token.size:
                continue
            position = position[token]
            wanted = routing.index[token, position]
            gate = routing.weight[token, position].astype(np.float64)
            whole = book.nats[wanted] * gate**2  # [n], price of dropping
            # [n, F]: in each form, here or read
            forms = whole[:, None] * squared[:, wanted].T + extra[:, wanted].T
            listed = book.buddy[wanted]  # [n, B]
            free = (listed >= 0) & resident[PRIMARY, np.maximum(listed, 0)]
            free &= ~used[token[:, None], np.maximum(listed, 0)]
            others = np.where(free, whole[:, None] * book.buddy_eps[wanted] ** 2, np.inf)
            costs = np.concatenate([forms, others, whole[:, None]], axis=1)
            best = costs.argmin(axis=1)  # the earlier one of equals
            is_buddy = (best >= n_forms) & (best < costs.shape[1] - 1)
            column[token, position] = np.where(
                best < n_forms, _SELF, np.where(is_buddy, best - n_forms, _NOTHING)
            )
            form[token, position] = np.where(best < n_forms, best, PRIMARY)
            used[token[is_buddy], listed[is_buddy, best[is_buddy] - n_forms]] = True
        return form, column

    def _reroute(
        self, routing: Routing, resident: np.ndarray, is_open: np.ndarray, answers: Answers
    ) -> None:
        """Re-route the open slots [T, K] of tokens that keep enough of their scores, in place; open
        slots are those that no form of the wanted expert answers."""
        row = np.flatnonzero(is_open.any(axis=1) & routing.present.all(axis=1))
        if not row.size:
            return
        assert routing.score is not None and routing.logits is not None, "the policy asked for them"
        assert self.reweigh is not None
        wanted, opened = routing.index[row], is_open[row]
        score = as_shares(routing.score[row], are_logits=self.scores_are_logits)  # [n, E]
        every = np.arange(len(row))[:, None]
        n_experts = score.shape[1]
        here = np.broadcast_to(resident[PRIMARY], score.shape).copy()
        np.put_along_axis(here, wanted, False, axis=1)
        ranked = np.argsort(np.where(here, -score, np.inf), axis=1, kind="stable")
        turn = np.minimum(np.cumsum(opened, axis=1) - 1, n_experts - 1)
        new = np.where(opened, ranked[every, np.maximum(turn, 0)], wanted)  # [n, K]
        kept = score[every, new].sum(axis=1)
        moves = kept >= self.reroute * score[every, wanted].sum(axis=1)
        moves &= opened.sum(axis=1) <= here.sum(axis=1)
        row, new = row[moves], new[moves]
        if row.size:
            present = np.ones(new.shape, dtype=bool)
            answers.expert[row], answers.present[row] = new, present
            answers.weight[row] = self.reweigh[routing.layer](routing.logits[row], new, present)


SPEC = PolicySpec(
    name="priced",
    summary="whatever is expected to cost least: a cheaper form, a listed stand-in, the residents "
    "that the router ranks next, nothing, or itself",
    make=Priced,
    inert="nats-per-mb=0",
    parameters={
        "nats-per-mb": Parameter(
            help="what avoiding a read of 10^6 bytes is worth; inf never reads",
            default=math.inf,
            most=math.inf,
        ),
        "reroute": Parameter(
            help="share of the router's scores that re-routing has to keep; above 1: none",
            default=0.5,
            most=2,
        ),
    },
    needs=(PRICES,),
    residents="cheapest",
    strength=Strength(parameter="nats-per-mb", grid=price_grid),
    alternatives={"reroute": (2.0, 0.75)},
)
