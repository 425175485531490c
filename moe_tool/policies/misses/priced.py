"""Priced answers: a missing expert is answered by whatever is expected to cost least."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing, keep
from moe_tool.policies.misses.needs import PRICES
from moe_tool.policies.misses.price_book import (
    REROUTED,
    STRUCTURED_CLASS,
    LayerBook,
    PriceBook,
    rerouted_share,
)
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.score_shares import as_shares
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.strength import Strength, price_grid
from moe_tool.policies.parameters import Parameter

_LEAST_SHARE = 1e-30


def worth_of_reads(values: Values, book: PriceBook, *, n_slots: int) -> float:
    """Return the worth of avoiding a read of 10^6 bytes in nats, with which a run begins.

    With a target it is that of a read that saves four times a slot's share of the target.

    Args:
        values: parameters of `priced`.
        n_slots: slots of a token, in all layers.
    """
    if not math.isinf(values["nats-per-mb"]) or math.isinf(values["kl"]):
        return values["nats-per-mb"]
    return 4 * values["kl"] / n_slots / (book.record_bytes[PRIMARY] / 1e6)


class Priced(MissPolicy):
    """Answers every missing expert with the least price + nats per MB * bytes to read.

    Candidates: a cheaper form, resident or read; a listed resident stand-in with its scale; the
    resident that the router ranks next, weighed by the model's rule; nothing; the expert itself,
    read from the bundle. The cost of a read follows from its bytes, never from a clock, and a token
    is charged for its own reads alone, so that its answers do not depend on the batch. Slots are
    answered in descending gate weight, and a token uses no other expert twice.
    """

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.prices is not None
        self.book = inputs.prices
        self.target_kl = values["kl"] if math.isinf(values["nats-per-mb"]) else math.inf
        self.nats_per_mb = worth_of_reads(
            values, inputs.prices, n_slots=inputs.top_k * len(inputs.prices.layers)
        )
        self.reroute, self.reweigh = values["reroute"], inputs.reweigh
        self.scores_are_logits = inputs.scores_are_logits
        self.needs_router = (
            "nothing" if self.reweigh is None or math.isinf(self.reroute) else "scores"
        )

    def describe(self) -> str:
        if not math.isinf(self.target_kl):
            price = f"reads keep the expected loss at {self.target_kl:.3g} nats per token"
        elif math.isinf(self.nats_per_mb):
            price = "nothing is read for a miss"
        else:
            price = f"a read of 1 MB is worth {self.nats_per_mb:.3g} nats"
        return f"priced: the cheapest answer to a missing expert, text may differ ({price})"

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        if resident[PRIMARY].all() or self._worth(routing) == 0:
            return keep(routing)
        chosen = _Chosen.exact(routing.index.shape)
        self._choose(chosen, self.book.layers[routing.layer], routing, resident)
        present = routing.present & ~chosen.is_dropped
        weight = routing.weight.astype(np.float32) * chosen.scale
        moved = np.flatnonzero(chosen.is_rerouted.any(axis=1))
        if moved.size:
            assert self.reweigh is not None and routing.logits is not None
            members = np.where(chosen.is_rerouted, chosen.other, routing.index)[moved]
            weights = self.reweigh[routing.layer](
                routing.logits[moved], members, routing.present[moved]
            )
            weight[moved] = weights * chosen.scale[moved]
        return Answers(
            expert=np.where(chosen.other >= 0, chosen.other, routing.index),
            present=present,
            weight=np.where(present, weight, np.float32(0)),
            form=chosen.form,
        )

    def _worth(self, routing: Routing) -> float:
        """Return the worth of avoiding a read of 10^6 bytes, nats."""
        return self.nats_per_mb if routing.nats_per_mb is None else routing.nats_per_mb

    def _choose(
        self, chosen: "_Chosen", book: LayerBook, routing: Routing, resident: np.ndarray
    ) -> None:
        """Choose the cheapest answer to every slot with a missing expert, in place."""
        n_forms, n_experts = resident.shape
        factors = np.ones(1 + n_forms) if routing.factors is None else routing.factors
        by_form = np.concatenate([[0.0], factors[2:]])[:, None]
        is_stored = np.isfinite(book.eps)
        with np.errstate(invalid="ignore"):  # inf * 0 bytes of a form that is not stored
            reading = self._worth(routing) * book.record_bytes / 1e6
            extra = np.where(is_stored, np.where(resident, 0.0, reading), np.inf)  # [F, E]
        squared = by_form * np.where(is_stored, book.eps, 0.0) ** 2  # [F, E]
        score = None
        if self.needs_router == "scores":
            assert routing.score is not None, "the policy asked for it"
            score = as_shares(routing.score, are_logits=self.scores_are_logits)  # [T, E]
        every, used = np.arange(len(routing.index)), routing.is_wanted(n_experts)
        missing = routing.present & ~resident[PRIMARY][routing.index]
        order = np.argsort(-routing.weight, axis=1, kind="stable")
        for position in order.T:
            token = np.flatnonzero(missing[every, position])
            if not token.size:
                continue
            slot = (token, position[token])
            wanted, gate = routing.index[slot], routing.weight[slot].astype(np.float64)
            whole = book.nats[wanted] * gate**2  # [n], price of dropping
            is_free = resident[PRIMARY] & ~used[token]  # [n, E]
            listed = book.buddy[wanted]  # [n, B]
            is_there = (listed >= 0) & np.take_along_axis(is_free, np.maximum(listed, 0), axis=1)
            alike = factors[STRUCTURED_CLASS] * whole[:, None]
            costs = [
                whole[:, None] * squared[:, wanted].T + extra[:, wanted].T,
                np.where(is_there, alike * book.buddy_eps[wanted] ** 2, np.inf),
                alike,
            ]
            ranked = np.zeros((len(token), 1), dtype=np.int64)
            if score is not None:
                ranked, cost = self._next_ranked(book, score[token], is_free, wanted, gate)
                costs.append(factors[REROUTED] * cost)
            best = np.concatenate(costs, axis=1).argmin(axis=1)  # the earlier one of equals
            chosen.enter(slot, best - n_forms, form=best, listed=listed, ranked=ranked[:, 0])
            is_listed = (best >= n_forms) & (best < n_forms + listed.shape[1])
            at = best[is_listed] - n_forms
            scales = book.buddy_scale[wanted[is_listed], at]
            chosen.scale[token[is_listed], position[token][is_listed]] = scales
            other = chosen.other[slot]
            used[token[other >= 0], other[other >= 0]] = True

    def _next_ranked(
        self,
        book: LayerBook,
        score: np.ndarray,
        is_free: np.ndarray,
        wanted: np.ndarray,
        gate: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the free expert with the best score for each of n slots, [n, 1], and the price of
        re-routing to it, [n, 1]; infinite where none is free."""
        offered = np.where(is_free, score, -1.0)  # [n, E]
        best, every = offered.argmax(axis=1), np.arange(len(wanted))
        ratio = offered[every, best] / np.maximum(score[every, wanted], _LEAST_SHARE)
        both = book.nats[wanted] * gate**2 + book.nats[best] * (gate * np.minimum(ratio, 1)) ** 2
        cost = np.where(is_free.any(axis=1), self.reroute * rerouted_share(ratio) * both, np.inf)
        return best[:, None], cost[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """Answers to every slot, [T, K] each, to be filled in."""

    form: np.ndarray
    """Form of the wanted expert; PRIMARY where it does not answer itself"""
    other: np.ndarray
    """Expert that answers in its place; -1: itself or nothing"""
    scale: np.ndarray
    """float32 factor on the gate weight: a listed stand-in's, 1 elsewhere"""
    is_dropped: np.ndarray
    is_rerouted: np.ndarray
    """Whether `other` has the slot by the router's own rule"""

    @classmethod
    def exact(cls, shape: tuple[int, int]) -> Self:
        """Return answers by the wanted experts themselves."""
        return cls(
            form=np.full(shape, PRIMARY),
            other=np.full(shape, -1),
            scale=np.ones(shape, dtype=np.float32),
            is_dropped=np.zeros(shape, dtype=bool),
            is_rerouted=np.zeros(shape, dtype=bool),
        )

    def enter(
        self,
        slot: tuple[np.ndarray, np.ndarray],
        kind: np.ndarray,
        *,
        form: np.ndarray,
        listed: np.ndarray,
        ranked: np.ndarray,
    ) -> None:
        """Enter the answers to n slots.

        Args:
            slot: tokens and positions.
            kind: [n]: negative for a form, then the listed stand-ins, dropping and re-routing.
            form: [n]: the form where `kind` is negative.
            listed, ranked: [n, B] and [n]: experts that may answer.
        """
        n_listed = listed.shape[1]
        self.form[slot] = np.where(kind < 0, form, PRIMARY)
        self.is_dropped[slot] = kind == n_listed
        self.is_rerouted[slot] = kind == n_listed + 1
        other = np.where(kind == n_listed + 1, ranked, -1)
        is_listed = (kind >= 0) & (kind < n_listed)
        other[is_listed] = listed[is_listed, kind[is_listed]]
        self.other[slot] = other


SPEC = PolicySpec(
    name="priced",
    summary="whatever is expected to cost least: a cheaper form, a listed stand-in, the residents "
    "that the router ranks next, nothing, or itself",
    make=Priced,
    inert="nats-per-mb=0",
    fires="kl=inf",
    parameters={
        "kl": Parameter(
            help="expected loss at which a run's reads are kept, nats per token; inf never reads",
            default=0.005,
            least=1e-6,
            most=math.inf,
        ),
        "nats-per-mb": Parameter(
            help="what avoiding a read of 10^6 bytes is worth, in place of kl; inf: as kl says",
            default=math.inf,
            most=math.inf,
        ),
        "reroute": Parameter(
            help="factor on the price of re-routing; inf: none",
            default=1.0,
            most=math.inf,
        ),
    },
    replaces={"nats-per-mb": {"kl": math.inf}},
    needs=(PRICES,),
    residents="cheapest",
    strength=Strength(parameter="nats-per-mb", grid=price_grid),
    alternatives={"reroute": (math.inf, 3.0)},
)
