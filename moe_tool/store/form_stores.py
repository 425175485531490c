"""Stores of a bundle's experts in all forms: one store for each record size."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np

from moe_tool.artifacts.expert_ids import FormIds
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.progress import SILENT, Progress
from moe_tool.store.protocol import ExpertStore, SelectChannels, Supply


class FormStores:
    """An `ExpertStore` that passes every expert and form to the store that holds it.

    Each store has its own slots, pins and readers, so that a read of one form never evicts another
    form.
    """

    def __init__(
        self,
        primaries: Sequence[ExpertStore],
        cheaper: Sequence[ExpertStore | None] = (),
        *,
        primary_of: Mapping[int, Sequence[int | None]],
        in_step: bool = False,
    ) -> None:
        """Take the stores over.

        Args:
            primaries: stores of the primary forms.
            cheaper: store of each cheaper form; None: the form is never in memory.
            primary_of: decoder layer -> position among `primaries` of each expert's store, [E];
                None: the expert was removed.
            in_step: the stores of cheaper forms have the eviction policy of the primaries and are
                told of every call; otherwise only of those that name their form.
        """
        self.hints = primaries[0].hints
        self._primaries = tuple(primaries)
        self._cheaper = tuple(cheaper)
        self._stores = tuple(each for each in (*primaries, *cheaper) if each is not None)
        self._primary_of = primary_of
        self._in_step = in_step
        self._prefetched: set[int] = set()
        """Cheaper forms that were prefetched, which are told of every call to settle it"""
        n_experts = len(next(iter(primary_of.values())))
        self._ids = FormIds(n_experts)
        self._none = np.zeros((1, n_experts), dtype=bool)

    def resident(self, layer: int) -> np.ndarray:
        return self._joined(lambda store: store.resident(layer))

    def pinned_mask(self, layer: int) -> np.ndarray:
        return self._joined(lambda store: store.pinned_mask(layer))

    def load_pinned(self, progress: Progress = SILENT) -> None:
        for store in self._stores:
            store.load_pinned(progress)

    def begin_sequence(self) -> None:
        for store in self._stores:
            store.begin_sequence()

    def select_channels(self, layer: int, experts: Sequence[int], select: SelectChannels) -> None:
        for store, part in zip(self._primaries, self._split(layer, experts), strict=True):
            store.select_channels(layer, part, select)

    def acquire(
        self,
        layer: int,
        numbers: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
        elsewhere: Sequence[int] = (),
    ) -> Supply:
        """Begin the reads of all forms; cheap forms, which are mostly resident, come first."""
        by_form = self._by_form(numbers)
        primary = by_form.pop(PRIMARY, [])
        # Every primary store is called, so that it settles its prefetches by this call.
        parts = [primary] if len(self._primaries) == 1 else self._split(layer, primary)
        if self._in_step:
            return self._acquire_in_step(layer, parts, by_form, counters, scores)
        supplies = [
            store.acquire(layer, part, counters, scores=scores)
            for store, part in zip(self._primaries, parts, strict=True)
        ]
        forms = self._prefetched.union(by_form)
        if not forms and len(supplies) == 1:
            return supplies[0]
        cheap = []
        for form in sorted(forms, reverse=True):
            supply = self._cheaper_store(form).acquire(layer, by_form.get(form, []), counters)
            cheap.append(self._numbered(supply, form))
        return chain.from_iterable([*cheap, *supplies])

    def _acquire_in_step(
        self,
        layer: int,
        primary: list[list[int]],
        by_form: Mapping[int, list[int]],
        counters: PhaseCounters,
        scores: np.ndarray | None,
    ) -> Supply:
        """Begin the reads of every store; each is also told who answers in another form.

        Args:
            primary: experts in their primary form, by primary store.
            by_form: experts in a cheaper one.
        """
        lower = self._split(layer, sorted({e for part in by_form.values() for e in part}))
        supplies = [
            store.acquire(layer, part, counters, scores=scores, elsewhere=heard)
            for store, part, heard in zip(self._primaries, primary, lower, strict=True)
        ]
        whole = sorted(chain.from_iterable(primary))
        cheap = []
        for form in range(len(self._cheaper), 0, -1):
            store = self._cheaper[form - 1]
            assert store is not None or form not in by_form, "a form that is not held was named"
            if store is not None:
                part = by_form.get(form, [])
                supply = store.acquire(layer, part, counters, scores=scores, elsewhere=whole)
                cheap.append(self._numbered(supply, form))
        return chain.from_iterable([*cheap, *supplies])

    def prefetch(
        self, layer: int, numbers: Sequence[int], *, spare: Sequence[int], counters: PhaseCounters
    ) -> None:
        by_form, spared = self._by_form(numbers), self._by_form(spare)
        parts = self._split(layer, by_form.pop(PRIMARY, []))
        kept_parts = self._split(layer, spared.pop(PRIMARY, []))
        for store, part, kept in zip(self._primaries, parts, kept_parts, strict=True):
            if part or kept:
                store.prefetch(layer, part, spare=kept, counters=counters)
        for form in sorted({*by_form, *spared}):
            self._prefetched.add(form)
            self._cheaper_store(form).prefetch(
                layer, by_form.get(form, []), spare=spared.get(form, []), counters=counters
            )

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        for store, part in zip(self._primaries, self._split(layer, experts), strict=True):
            store.expect(layer, part, ahead=ahead)
        for cheaper in self._cheaper if self._in_step else ():
            if cheaper is not None:
                cheaper.expect(layer, experts, ahead=ahead)

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def _joined(self, mask_of: Callable[[ExpertStore], np.ndarray]) -> np.ndarray:
        """Join masks [1, E] of each primary store and of each cheaper form to [F, E]."""
        primaries = [mask_of(store) for store in self._primaries]
        if len(primaries) == 1 and not self._cheaper:
            return primaries[0]
        cheaper = [self._none if store is None else mask_of(store) for store in self._cheaper]
        return np.concatenate([np.logical_or.reduce(primaries), *cheaper])

    def _by_form(self, numbers: Sequence[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for number in numbers:
            form, expert = self._ids.pair(number)
            found.setdefault(form, []).append(expert)
        return found

    def _cheaper_store(self, form: int) -> ExpertStore:
        store = self._cheaper[form - 1]
        assert store is not None, "a policy named a form that is not held"
        return store

    def _split(self, layer: int, experts: Sequence[int]) -> list[list[int]]:
        """Return experts by the primary store that holds them, in order, without removed ones."""
        parts: list[list[int]] = [[] for _ in self._primaries]
        for expert in experts:
            at = self._primary_of[layer][expert]
            if at is not None:
                parts[at].append(expert)
        return parts

    def _numbered(self, supply: Supply, form: int) -> Supply:
        for expert, weights in supply:
            yield self._ids.number(form, expert), weights
