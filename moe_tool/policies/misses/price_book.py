"""Prices of every answer to a miss, as arrays.

A price is the nats that a slot's answer is expected to add to the divergence of the model's output:
nats[i] * w^2 * eps^2 for an answer with relative error eps in a slot of gate weight w.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing
from moe_tool.policies.misses.score_shares import as_shares

_LEAST_SHARE = 1e-30
STRUCTURED = 2.0
"""Price of a structured error, as a multiple of that of noise of the same size.

The profile's sensitivity is to noise, like the error of rounding to two bits or more. An error that
removes a part of the output (dropping, a stand-in, a low-rank map, one bit) matters more to the
next layers: on two trained models measured over expected divergence was 0.8 to 1.6 for noise and
1.7 to 2.8 for structured errors."""


REROUTED, STRUCTURED_CLASS = 0, 1
"""Classes of answers: an expert that the router scored, by its own weight rule; a listed stand-in,
any other expert, or nothing. From 2 on: the cheaper forms 1, 2, ..."""


def rerouted_share(ratio: np.ndarray) -> np.ndarray:
    """Return the price of re-routing, as a share of dropping the one expert and adding the other.

    Fitted on two trained models: two experts that the router scores alike answer a token alike, on
    text of the profile's kind (0.12 to 0.3 from a ratio of 0.65 on, 0.3 to 0.6 below) and on text
    of another kind (0.18 to 0.32, and 0.27 to 0.88), where forms cost six to ten times their price.

    Args:
        ratio: the newcomer's share of the router's scores over that of the expert it answers for.
    """
    missing: np.ndarray = 1.0 - np.clip(ratio, 0.0, 1.0)
    share: np.ndarray = 0.2 + 0.8 * missing**3
    return share


def effective_error(eps: np.ndarray, *, is_noise: bool) -> np.ndarray:
    """Return errors relative to an expert's own output by their effect, scaled so that dropping is
    1; errors of rounding are noise. Their prices are `STRUCTURED` times the sensitivity."""
    wide = np.asarray(eps, dtype=np.float64)
    return wide / np.sqrt(STRUCTURED) if is_noise else wide


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBook:
    """One layer's prices. E experts, F forms, B listed stand-ins."""

    nats: np.ndarray
    """[E] float64: price of dropping each expert in a slot of gate weight 1"""
    eps: np.ndarray
    """[F, E] float64: effective error of each form; 0 at PRIMARY, infinite if not stored"""
    record_bytes: np.ndarray
    """[F, E] int64: size of each record; 0 if not stored"""
    buddy: np.ndarray
    """[E, B] int64: listed stand-ins, padded with -1"""
    buddy_scale: np.ndarray
    """[E, B] float64: factor on the gate weight"""
    buddy_eps: np.ndarray
    """[E, B] float64: relative error at that scale, padded with infinity"""

    def stand_in_cost(
        self, wanted: np.ndarray, weight: np.ndarray, used: np.ndarray, used_weight: np.ndarray
    ) -> np.ndarray:
        """Return the prices of slots answered by another expert at any weight, [n] float64.

        With E_i = a E_j + rest, ||rest|| = eps ||E_i||, the error of w' E_j for w E_i is that of
        the rest and of w' - a w. An unlisted stand-in is assumed to be orthogonal to the expert.

        Args:
            wanted: [n] experts.
            weight: [n] their gate weights.
            used: [n] experts that answer.
            used_weight: [n] the weights they answer with.
        """
        listed = self.buddy[wanted] == used[:, None]  # [n, B]
        is_listed = listed.any(axis=1)
        row = np.arange(len(wanted))
        if self.buddy.shape[1]:
            column = listed.argmax(axis=1)
            scale = self.buddy_scale[wanted][row, column]
            squared = np.minimum(self.buddy_eps[wanted][row, column] ** 2, 1.0)
        else:
            scale, squared = np.zeros(len(wanted)), np.ones(len(wanted))
        is_listed &= scale != 0
        # ||E_j||^2 / ||E_i||^2 on the tokens of i
        size = np.divide(1 - squared, scale**2, out=np.zeros_like(scale), where=is_listed)
        close = weight**2 * squared + (weight * scale - used_weight) ** 2 * size
        nats, other = self.nats[wanted], self.nats[used]
        far = nats * weight**2 + other * used_weight**2
        cost: np.ndarray = np.where(is_listed, nats * close, far)
        return cost


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBook:
    """Prices of all layers, for the planner, the policies and the account."""

    layers: Mapping[int, LayerBook]
    """Decoder layer -> prices"""
    scores_are_logits: bool = True
    """Whether the routers choose by their logits; see PolicyInputs"""

    def without_cheaper(self) -> "PriceBook":
        """Return the prices of a run that has no cheaper form in memory and reads none."""
        layers = {
            number: replace(
                book, eps=np.where(np.arange(len(book.eps))[:, None] == PRIMARY, book.eps, np.inf)
            )
            for number, book in self.layers.items()
        }
        return replace(self, layers=layers)

    @property
    def record_bytes(self) -> tuple[int, ...]:
        """Mean size of a stored record, by form."""
        sizes = np.concatenate([each.record_bytes for each in self.layers.values()], axis=1)
        return tuple(int(row.sum() // max(1, np.count_nonzero(row))) for row in sizes)

    @property
    def typical_nats_per_mb(self) -> float:
        """KL per MB of dropping an average expert at gate weight 0.5; answers change around it."""
        nats = [float(each.nats.mean()) / 4 for each in self.layers.values()]
        return sum(nats) / len(nats) / (self.record_bytes[PRIMARY] / 1e6)

    def spent(self, routing: Routing, answers: Answers) -> np.ndarray:
        """Return the expected divergence of the answers to a layer call, [T] float64 nats.

        Errors of slots are added up as if independent.
        """
        total: np.ndarray = self.by_class(routing, answers).sum(axis=1)
        return total

    def by_class(self, routing: Routing, answers: Answers) -> np.ndarray:
        """Return the expected divergence of the answers to a layer call by their class, [T, 1 + F]
        float64 nats: re-routed, structured, then each cheaper form.

        Without the router's scores an expert that is not listed is priced as structured.
        """
        book = self.layers[routing.layer]
        wanted, used = routing.index.reshape(-1), answers.expert.reshape(-1)
        form = answers.form.reshape(-1)
        # Rounded: the last bits differ with the number of threads, and the account must not.
        weight = routing.weight.reshape(-1).astype(np.float16).astype(np.float64)
        used_weight = answers.weight.reshape(-1).astype(np.float16).astype(np.float64)
        same = book.nats[wanted] * (
            (weight - used_weight) ** 2 + (used_weight * book.eps[form, used]) ** 2
        )
        other = book.stand_in_cost(wanted, weight, used, used_weight)
        dropped = book.nats[wanted] * weight**2
        is_other, shape = used != wanted, routing.index.shape
        moved = np.full(len(wanted), np.inf)
        if routing.score is not None and is_other.any():
            score = as_shares(routing.score, are_logits=self.scores_are_logits)
            token = np.repeat(np.arange(shape[0]), shape[1])
            ratio = score[token, used] / np.maximum(score[token, wanted], _LEAST_SHARE)
            both = dropped + book.nats[used] * used_weight**2
            moved = np.where(is_other, rerouted_share(ratio) * both, np.inf)
        is_moved = answers.present.reshape(-1) & is_other & (moved < other)
        cost = np.where(is_other, np.minimum(other, moved), same).reshape(shape)
        cost = np.where(answers.present, cost, dropped.reshape(shape))
        cost = np.where(routing.present, cost, 0.0)
        kind = np.where(form > 0, form + 1, STRUCTURED_CLASS)
        kind = np.where(is_moved, REROUTED, kind).reshape(shape)
        kind = np.where(answers.present, kind, STRUCTURED_CLASS)
        found = np.zeros((shape[0], 1 + len(book.eps)))
        np.add.at(found, (np.arange(shape[0])[:, None], kind), cost)
        return found
