"""Whatever is expected to cost least answers a missing expert."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moe_tool.artifacts.routing import FULL, Answers, Routing, answers_of
from moe_tool.policies.misses.price_book import PriceBook
from moe_tool.policies.misses.protocol import keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """Takes for every missing expert the least of price + patience * bytes still to be read.

    The answers: the expert in a cheaper form, in memory or read for it; a listed stand-in in
    memory, with its scale; nothing; the expert itself, read from the bundle. What a read is waited
    for follows from its bytes, never from a clock, and a token pays for its own reads alone: so its
    answers do not depend on the company it is in. Slots are answered in descending gate weight, and
    no stand-in is used twice by a token.
    """

    book: PriceBook
    nats_per_mb: float
    """What avoiding a read of 10^6 bytes may cost; 0 is exact, infinity reads nothing"""
    lossy: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    needs_score: ClassVar[bool] = False

    def describe(self) -> str:
        """Return one line for the announcement."""
        if math.isinf(self.nats_per_mb):
            patience = "nothing is read for a miss"
        else:
            patience = f"a read of 1 MB is worth {self.nats_per_mb:.3g} nats"
        return f"priced: the cheapest answer to a missing expert, text may differ ({patience})"

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the cheapest answers; see MissPolicy."""
        if routing.phase == "prompt" or resident[FULL].all() or self.nats_per_mb == 0:
            return keep(routing)
        book = self.book.layers[routing.layer]
        n_tokens, top_k = routing.index.shape
        n_levels, n_experts = resident.shape
        expert, weight = routing.index.copy(), routing.weight.astype(np.float32)
        level = np.full(expert.shape, FULL)
        every = np.arange(n_tokens)
        used = np.zeros((n_tokens, n_experts + 1), dtype=bool)
        used[every[:, None], np.minimum(routing.index, n_experts)] = True
        reading = np.array([self.nats_per_mb * size / 1e6 for size in self.book.record_bytes])
        order = np.argsort(-routing.weight, axis=1, kind="stable")
        for rank in range(top_k):
            position = order[:, rank]
            wanted = routing.index[every, position]
            token = np.flatnonzero(wanted < n_experts)
            token = token[~resident[FULL, wanted[token]]]
            if not token.size:
                continue
            wanted, position = wanted[token], position[token]
            gate = routing.weight[token, position].astype(np.float64)
            whole = book.nats[wanted] * gate**2  # of nothing, [n]
            # [n, L]: in each form, here or read
            forms = whole[:, None] * book.eps[:, wanted].T ** 2
            forms = forms + np.where(resident[:, wanted].T, 0.0, reading[:n_levels])
            listed = book.buddy[wanted]  # [n, B]
            free = (listed >= 0) & resident[FULL, np.maximum(listed, 0)]
            free &= ~used[token[:, None], np.maximum(listed, 0)]
            others = np.where(free, whole[:, None] * book.buddy_eps[wanted] ** 2, np.inf)
            costs = np.concatenate([forms, others, whole[:, None]], axis=1)
            best = costs.argmin(axis=1)  # the earlier one of equals
            row = np.arange(token.size)
            is_buddy = (best >= n_levels) & (best < costs.shape[1] - 1)
            column = np.where(is_buddy, best - n_levels, 0)
            is_nothing = best == costs.shape[1] - 1
            stand_in = listed[row, column] if listed.shape[1] else wanted
            chosen = np.where(is_nothing, -1, np.where(is_buddy, stand_in, wanted))
            expert[token, position] = chosen
            level[token, position] = np.where(best < n_levels, best, FULL)
            if listed.shape[1]:
                scale = np.where(is_buddy, book.buddy_scale[wanted][row, column], 1.0)
                weight[token, position] *= scale.astype(np.float32)
            weight[token[is_nothing], position[is_nothing]] = 0
            used[token[is_buddy], chosen[is_buddy]] = True
        return answers_of(routing, expert, weight, level)
