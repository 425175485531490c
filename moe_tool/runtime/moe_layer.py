"""Experts function of a running model: decides, fetches, computes and accounts each layer call."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from moe_tool.artifacts.expert_ids import FormIds
from moe_tool.artifacts.routing import (
    PRIMARY,
    Answers,
    Routing,
    answer_exactly,
    count_answers,
)
from moe_tool.artifacts.run_stats import PhaseCounters, RunStats
from moe_tool.experts.channel_forward import choose_channels
from moe_tool.experts.combine import run_experts
from moe_tool.models.attention_sums import AttentionSums
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.eviction import gate_scores
from moe_tool.policies.misses import MissPolicy
from moe_tool.policies.misses.prune import token_importance
from moe_tool.policies.prefetch import Prediction, fetch_predicted
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.runtime.call_recorder import CallRecorder
from moe_tool.runtime.drift_watch import DriftWatch
from moe_tool.runtime.foresight import Foresight, Guess
from moe_tool.runtime.live_prices import LivePrices, ReadWorth, corrected
from moe_tool.runtime.mask_scores import slot_worth
from moe_tool.runtime.measured_costs import MeasuredCosts
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.partial_layer import PartialLayer
from moe_tool.runtime.partial_sum import PartialSum
from moe_tool.runtime.policy_choice import ChosenPolicy
from moe_tool.runtime.prefetcher import Prefetcher
from moe_tool.runtime.quality_account import QualityAccount
from moe_tool.store.protocol import ExpertStore, on_host

Phase = Literal["prompt", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Answers of the policy to one layer call."""

    routing: Routing
    answers: Answers
    resident: np.ndarray
    """[F, E] bool: forms in memory as reported to the policy"""
    spent: np.ndarray | None
    """[T] float64: expected price of the answers; None without a price list"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One forward of the model, through all layers."""

    phase: Phase = "prompt"
    n_sequences: int = 1
    """B; the T tokens are B runs of T / B"""
    exact_fallback: np.ndarray | None = None
    """[B] bool: sequences under exact fallback; None: no sequence"""


@dataclass(slots=True, kw_only=True)
class MoeLayerRunner:
    """Experts function of a session, which sets `forward` before every forward."""

    store: ExpertStore
    residency: Residency
    policy: ChosenPolicy
    """Policy that answers misses while decoding"""
    sparsity: float | None = None
    """Share of an expert's channels left out while decoding one sequence; None: all are computed"""
    prefetcher: Prefetcher[LayerCall] | None = None
    """Prefetcher while decoding; a prompt's tokens want nearly every expert of a layer anyway"""
    part_prefetcher: Prefetcher[PartialLayer] | None = None
    """Prefetcher that waits for the outputs of the experts in memory; at most one of both is set"""
    foresight: Foresight | None = None
    """Predictions for the eviction policy while decoding"""
    costs: MeasuredCosts | None = None
    """Times of reads and products, for policies that need them"""
    recorder: CallRecorder | None = None
    """Recorder of every call; None: no trace"""
    stats: RunStats = field(default_factory=RunStats)
    account: QualityAccount = field(default_factory=QualityAccount)
    is_lossy_prompt: bool = False
    """Whether the policy answers prompts too. By default they are exact, since errors that a prompt
    leaves in the KV cache last"""
    attention: AttentionSums | None = None
    """Attention that a prompt's tokens receive, for policies that need it"""
    forward: Forward = Forward()
    """Current forward"""
    is_probe: bool = False
    """Whether the current forward is taken back, once its loss is known"""
    live: LivePrices | None = None
    """Factors on prices that this text's measured losses give; None: nothing is measured"""
    worth: ReadWorth | None = None
    """Worth of avoiding a read, by this text's expected loss; None: as the policy has it"""
    probed: float = 0.0
    """Expected loss of the current probe in nats, over all sequences"""
    stored: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Decoder layer -> [E] bool: experts in the bundle; empty if none was removed"""
    record_bytes: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Decoder layer -> [F, E] int64: size of each record; 0 if a form is not stored"""
    watch: DriftWatch | None = None
    """Watch over text that is routed unlike the profile's; None: the bundle has no norm of it"""
    on_decision: Callable[[Decision], None] | None = None
    """Callback on every decode call"""

    def __call__(self, call: LayerCall) -> torch.Tensor:
        """Return the routed experts' output, [T, H]."""
        call, present = self._find_present(call)
        if self.watch is not None and call.router_logits is not None and not self.is_probe:
            self.watch.add(call.layer, call.router_logits)
        is_plain = self.residency == "cache" and not self.policy.is_lossy
        phase = self.forward.phase
        is_exact_prompt = phase == "prompt" and not self.is_lossy_prompt
        if is_exact_prompt or (is_plain and self.on_decision is None):
            return self._run(call, call.index, call.weight, present, self.stats.phase(phase))
        return self._decide_and_run(call, present)

    def _find_present(self, call: LayerCall) -> tuple[LayerCall, torch.Tensor | None]:
        """Return the call with valid experts only, weight 0 elsewhere, and a mask of the slots
        whose expert the bundle has; None: all slots."""
        index, present = call.find_present()
        if self.stored:
            is_stored = self.stored[call.layer][index]  # [T, K]
            present = is_stored if present is None else present & is_stored
        if present is None:
            return call, None
        return replace(call, index=index, weight=torch.where(present, call.weight, 0)), present

    def _decide_and_run(self, call: LayerCall, present: torch.Tensor | None) -> torch.Tensor:
        """Run a call by the policy's answers.

        A wanted expert is a hit if it was reported to the policy as resident. Under frozen
        residency that is the pinned set alone, so that hits do not depend on what else the cache
        happens to hold.
        """
        if self.residency == "frozen":
            resident = self.store.pinned_mask(call.layer)
        else:
            resident = self.store.resident(call.layer)
        routing = self._routing(call, present)
        answers = self.policy.policy.decide(routing, resident)
        exact = self.forward.exact_fallback
        if exact is not None and exact.any():
            answers = answer_exactly(routing, answers, exact[routing.sequence])
        spent = self._spend(routing, answers)
        if self.on_decision is not None:
            self.on_decision(
                Decision(routing=routing, answers=answers, resident=resident, spent=spent)
            )
        counted = count_answers(routing, answers)
        index, weight = call.index, call.weight
        if counted.substitutions or counted.replica_answers or counted.drops:
            numbers = FormIds(resident.shape[1]).number(answers.form, answers.expert)
            index, weight = torch.from_numpy(numbers), torch.from_numpy(answers.weight)
            present = torch.from_numpy(answers.present)
        output = self._run(call, index, weight, present, counted)
        wanted = np.unique(routing.index[routing.present])
        counted.hits = int(resident[PRIMARY, wanted].sum())
        counted.misses = len(wanted) - counted.hits
        counted.skipped_fetch_bytes = self._skipped_fetch_bytes(routing, answers, resident)
        self.stats.count(self.forward.phase, counted)
        return output

    def _skipped_fetch_bytes(self, routing: Routing, answers: Answers, resident: np.ndarray) -> int:
        """Return the bytes of non-resident experts that were dropped instead of fetched."""
        sizes = self.record_bytes[routing.layer][PRIMARY]
        is_skipped = np.zeros(len(sizes), dtype=bool)
        is_skipped[routing.index[routing.present & ~answers.present]] = True
        is_skipped[answers.expert[answers.present]] = False
        return int(sizes[is_skipped & ~resident[PRIMARY]].sum())

    def _spend(self, routing: Routing, answers: Answers) -> np.ndarray | None:
        prices = self.policy.prices
        if prices is None or not self.policy.is_lossy:
            return None
        by_class = prices.by_class(routing, answers)  # [T, C]
        spent = corrected(by_class, routing.factors)  # [T]
        if self.is_probe:
            self.probed += self.account.nats_per_price * float(spent.sum())
            if self.live is not None:
                self.live.add(routing.layer, self.account.nats_per_price * by_class.sum(axis=0))
        elif self.forward.phase == "prompt":
            self.account.add_prompt(float(spent.sum()))
        else:
            n_sequences = self.forward.n_sequences
            self.account.add(np.bincount(routing.sequence, spent, minlength=n_sequences))
        return spent

    def _run(
        self,
        call: LayerCall,
        index: torch.Tensor,
        weight: torch.Tensor,
        present: torch.Tensor | None,
        counters: PhaseCounters,
    ) -> torch.Tensor:
        is_decode = self.forward.phase == "decode"
        part = self._part(call, counters) if is_decode else None

        def supply(wanted: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
            scores = self._scores(call)
            if self.sparsity is not None and is_decode:
                self._select_channels(call, wanted, self.sparsity)
            supplied = self.store.acquire(call.layer, wanted, counters, scores=scores)
            guesses: list[Guess] = []
            if is_decode:  # while the reads are under way
                if self.foresight is not None:
                    guesses = self.foresight.look(call, self.stored)
                    for guess in guesses:
                        self.store.expect(guess.layer, guess.experts, ahead=guess.ahead)
                if self.prefetcher is not None:
                    self.prefetcher.expect(
                        call,
                        self.store,
                        counters,
                        stored=self.stored,
                        policy=self._prefetch_policy(),
                    )
            if self.recorder is not None:
                self.recorder.record(
                    call.layer,
                    wanted,
                    is_decode=is_decode,
                    scores=scores,
                    guesses=[(guess.layer, e) for guess in guesses for e in guess.experts],
                )
            ready = on_host(supplied)
            if self.costs is not None and self.policy.policy.needs_costs and is_decode:
                n_experts = len(self.record_bytes[call.layer][PRIMARY])
                ready = self.costs.time_products(ready, lambda number: number >= n_experts)
            return ready if part is None else part.follow(ready, wanted)

        watch = None if part is None else part.add
        return run_experts(
            call.module, call.hidden, index, weight, supply, present=present, watch=watch
        )

    def _part(self, call: LayerCall, counters: PhaseCounters) -> PartialSum | None:
        """Return the sum of the call's experts in memory, from which prefetches are chosen."""
        prefetcher = self.part_prefetcher
        if prefetcher is None:
            return None

        def expect(routed: torch.Tensor) -> None:
            at = PartialLayer(call=call, routed=routed)
            prefetcher.expect(
                at, self.store, counters, stored=self.stored, heard=self._record_guess
            )

        return PartialSum(call.hidden, self.store.resident(call.layer).reshape(-1), expect)

    def _record_guess(self, predicted: Prediction) -> None:
        """Record experts that were predicted from a part of the call's output."""
        if self.recorder is None:
            return
        n_experts = len(self.record_bytes[predicted.layer][PRIMARY])
        stored = self.stored.get(predicted.layer)
        removed = np.zeros(n_experts, bool) if stored is None else ~stored.numpy()
        experts = fetch_predicted(predicted.index, predicted.weight, removed)
        self.recorder.add_guesses([(predicted.layer, expert) for expert in experts])

    def _prefetch_policy(self) -> MissPolicy | None:
        """Return the policy that chooses the forms of prefetches; None: they are read in full."""
        policy, exact = self.policy.policy, self.forward.exact_fallback
        is_exact = exact is not None and exact.any()
        return policy if policy.chooses_prefetches and not is_exact else None

    def _select_channels(self, call: LayerCall, wanted: list[int], sparsity: float) -> None:
        """Tell the store which channels one token needs, from the layer's own input."""
        if len(call.hidden) > 1:
            return
        self.store.select_channels(
            call.layer,
            wanted,
            lambda selector: choose_channels(call.module, selector, call.hidden, sparsity),
        )

    def _costs_ms(self) -> tuple[float, float] | None:
        needs_costs = self.policy.policy.needs_costs
        return self.costs.means_ms() if needs_costs and self.costs is not None else None

    def _scores(self, call: LayerCall) -> np.ndarray | None:
        """Return the router's scores [E] if eviction or the recorder needs them, else None."""
        is_asked = "scores" in self.store.hints or self.recorder is not None
        if not is_asked or call.router_logits is None:
            return None
        return gate_scores(_narrow(call.router_logits))

    def _routing(self, call: LayerCall, present: torch.Tensor | None) -> Routing:
        n_tokens, n_sequences = call.index.shape[0], self.forward.n_sequences
        score = logits = importance = worth = None
        need = self.policy.policy.needs_router
        if need != "nothing":
            assert call.router_logits is not None, "the router's hook did not answer"
            logits = _narrow(call.router_logits)
            if need == "scores":
                rule = self.policy.rules[call.layer]
                score = _narrow(rule.selection_scores(call.router_logits))
        if self.attention is not None and self.forward.phase == "prompt":
            received = self.attention.take(call.layer).reshape(-1)  # [T]
            importance = token_importance(call.hidden.float().numpy(), received.numpy())
        if masks := self.policy.masks:
            hidden = call.hidden.float()
            worth = slot_worth(masks[call.layer], hidden, call.index, call.weight).numpy()
        return Routing(
            layer=call.layer,
            index=call.index.numpy(),
            present=np.ones(call.index.shape, dtype=bool) if present is None else present.numpy(),
            weight=call.weight.to(torch.float32).numpy(),
            score=score,
            logits=logits,
            sequence=np.repeat(np.arange(n_sequences), n_tokens // n_sequences),
            importance=importance,
            worth=worth,
            costs_ms=self._costs_ms(),
            nats_per_mb=None if self.worth is None else self.worth.nats_per_mb,
            factors=None if self.live is None else self.live.factors(call.layer),
        )


def _narrow(scores: torch.Tensor) -> np.ndarray:
    """Round to float16 as a profile's trace does, clamped to its finite range."""
    limit = torch.finfo(torch.float16).max
    rounded: np.ndarray = scores.clamp(-limit, limit).to(torch.float16).numpy()
    return rounded
