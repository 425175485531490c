"""What every MoE layer of a running model calls: decide, fetch, compute, account."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from moe_tool.artifacts.routing import FULL, Answers, Routing, answer_exactly
from moe_tool.artifacts.run_stats import PhaseCounters, RunStats
from moe_tool.experts.combine import run_experts
from moe_tool.models.attention_sums import AttentionSums
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.eviction import gate_scores
from moe_tool.policies.misses.prune import token_importance
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.runtime.call_recorder import CallRecorder
from moe_tool.runtime.channel_choice import choose_for_call
from moe_tool.runtime.foresight import Foresight, Guess
from moe_tool.runtime.mask_scores import slot_worth
from moe_tool.runtime.policy_choice import ChosenPolicy
from moe_tool.runtime.prefetcher import Prefetcher
from moe_tool.runtime.quality_account import QualityAccount
from moe_tool.store.channel_store import ChannelStore
from moe_tool.store.expert_levels import ExpertLevels

Residency = Literal["frozen", "cache"]
Phase = Literal["prompt", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One layer call, as the policy saw and answered it."""

    routing: Routing
    answers: Answers
    resident: np.ndarray
    """[L, E] bool: what the policy was told is in memory"""
    spent: np.ndarray | None
    """[T] float64: what the price list expects the answers to cost; None without one"""


@dataclass(slots=True, kw_only=True)
class MoeLayerRunner:
    """The experts function of a session. Mutable: the session tells it which forward is under
    way."""

    store: ExpertLevels
    residency: Residency
    policy: ChosenPolicy
    """What answers misses while decoding"""
    sparsity: float | None = None
    """Share of an expert's channels that is left out while decoding one sequence; None: all are
    computed"""
    prefetcher: Prefetcher | None = None
    """Reads ahead while decoding: a prompt's tokens want nearly every expert of a layer anyway"""
    foresight: Foresight | None = None
    """What the eviction policy is told of the layers to come while decoding"""
    recorder: CallRecorder | None = None
    """Told about every call"""
    stats: RunStats = field(default_factory=RunStats)
    account: QualityAccount = field(default_factory=QualityAccount)
    answered_exactly: np.ndarray | None = None
    """[B] bool: sequences of the forward under way that the account has retreat"""
    is_lossy_prompt: bool = False
    """The policy answers prompts too. Otherwise they are exact: what a prompt leaves in the KV
    cache stays wrong for good"""
    attention: AttentionSums | None = None
    """Says which of a prompt's tokens matter, where the policy asks"""
    is_shadow: bool = False
    """The forward under way is exact, and counted nowhere"""
    phase: Phase = "prompt"
    n_sequences: int = 1
    """B of the forward under way; its T tokens are B runs of T / B"""
    absent: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> [E] bool: experts that the bundle left out; empty where it has all"""
    record_bytes: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Layer -> [E] int64: what a read of each expert takes"""
    on_decision: Callable[[Decision], None] | None = None
    """Told about every decode call"""

    def __call__(self, call: LayerCall) -> torch.Tensor:
        """Return the routed experts' output, [T, H]."""
        call = self.without_absent(call)
        if self.is_shadow:
            return self._run(call, call.index, call.weight, PhaseCounters())
        is_plain = self.residency == "cache" and not self.policy.policy.lossy
        is_exact_prompt = self.phase == "prompt" and not self.is_lossy_prompt
        if is_exact_prompt or (is_plain and self.on_decision is None):
            return self._run(call, call.index, call.weight, self.stats.phase(self.phase))
        return self._decide_and_run(call)

    def without_absent(self, call: LayerCall) -> LayerCall:
        """Return the call with no expert where the bundle has none."""
        if not self.absent:
            return call
        is_absent = self.absent[call.layer]  # [E]
        n_experts = len(is_absent)
        named = call.index.clamp(max=n_experts - 1)
        return replace(call, index=torch.where(is_absent[named], n_experts, call.index))

    def _decide_and_run(self, call: LayerCall) -> torch.Tensor:
        """Run a call by the policy's answers.

        A wanted expert is a hit if the policy was told that it is there: under frozen residency
        that is the pinned set alone, so that hits do not depend on what else lies in the cache by
        luck.
        """
        if self.residency == "frozen":
            resident = self.store.pinned_mask(call.layer)
        else:
            resident = self.store.resident(call.layer)
        routing = self._routing(call)
        answers = self._answers(routing, resident)
        spent = self._spend(routing, answers)
        if self.on_decision is not None:
            self.on_decision(
                Decision(routing=routing, answers=answers, resident=resident, spent=spent)
            )
        index, weight = call.index, call.weight
        if answers.substituted or answers.dropped or answers.lowered:
            index = torch.from_numpy(_numbers(answers, n_experts=resident.shape[1]))
            weight = torch.from_numpy(answers.weight)
        moved = PhaseCounters()
        output = self._run(call, index, weight, moved)
        wanted = np.unique(routing.index)
        hits = int(resident[FULL, wanted[wanted < resident.shape[1]]].sum())
        counters = self.stats.phase(self.phase)
        counters.hits += hits
        counters.misses += len(wanted) - hits
        counters.bytes_read += moved.bytes_read
        counters.whole_bytes += moved.whole_bytes
        counters.channels += moved.channels
        counters.channels_used += moved.channels_used
        counters.prefetches += moved.prefetches
        counters.prefetch_hits += moved.prefetch_hits
        counters.prefetched_bytes += moved.prefetched_bytes
        counters.stall_seconds += moved.stall_seconds
        counters.substitutions += answers.substituted
        counters.replica_answers += answers.lowered
        counters.drops += answers.dropped
        counters.skipped_fetch_bytes += self._spared_bytes(routing, answers, resident)
        return output

    def _spared_bytes(self, routing: Routing, answers: Answers, resident: np.ndarray) -> int:
        """Of experts that are wanted and not in memory, and that nobody reads: left out."""
        if not answers.dropped:
            return 0
        sizes = self.record_bytes[routing.layer]
        left_out = routing.index[(answers.expert < 0) & (routing.index < len(sizes))]
        is_spared = np.zeros(len(sizes), dtype=bool)
        is_spared[left_out] = True
        is_answered = (answers.expert >= 0) & (answers.expert < len(sizes))
        is_spared[answers.expert[is_answered]] = False
        return int(sizes[is_spared & ~resident[FULL]].sum())

    def _answers(self, routing: Routing, resident: np.ndarray) -> Answers:
        answers = self.policy.policy.decide(routing, resident)
        exact = self.answered_exactly
        if exact is not None and exact.any():
            answers = answer_exactly(routing, answers, exact[routing.sequence])
        return answers

    def _spend(self, routing: Routing, answers: Answers) -> np.ndarray | None:
        prices = self.policy.prices
        if prices is None or not self.policy.policy.lossy:
            return None
        spent = prices.spent(routing, answers)  # [T]
        if self.phase == "prompt":
            self.account.add_prompt(float(spent.sum()))
        else:
            self.account.add(np.bincount(routing.sequence, spent, minlength=self.n_sequences))
        return spent

    def _run(
        self, call: LayerCall, index: torch.Tensor, weight: torch.Tensor, counters: PhaseCounters
    ) -> torch.Tensor:
        def supply(wanted: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
            scores = self._scores(call)
            supplied = self._acquire(call, wanted, counters, scores)
            guesses: list[Guess] = []
            if self.phase == "decode":  # while the reads are under way
                if self.foresight is not None:
                    guesses = self.foresight.look(call)
                    for guess in guesses:
                        self.store.full.expect(guess.layer, guess.experts, ahead=guess.ahead)
                if self.prefetcher is not None:
                    self.prefetcher.expect(call, self.store.full, counters)
            if self.recorder is not None:
                self.recorder.record(
                    call.layer,
                    wanted,
                    is_decode=self.phase == "decode",
                    scores=scores,
                    guesses=[(guess.layer, e) for guess in guesses for e in guess.experts],
                )
            return supplied

        return run_experts(
            call.module, call.hidden, index, weight, supply, n_experts=self.store.n_numbers
        )

    def _acquire(
        self,
        call: LayerCall,
        wanted: list[int],
        counters: PhaseCounters,
        scores: np.ndarray | None,
    ) -> Iterator[tuple[int, ExpertWeights]]:
        store = self.store.full
        is_one = self.phase == "decode" and not self.is_shadow and call.hidden.shape[0] == 1
        if self.sparsity is None or not is_one or not isinstance(store, ChannelStore):
            return self.store.acquire(call.layer, wanted, counters, scores=scores)
        chosen = choose_for_call(call, wanted, store, self.sparsity)
        return store.acquire(call.layer, wanted, counters, scores=scores, chosen=chosen)

    def _scores(self, call: LayerCall) -> np.ndarray | None:
        """What the router says of all experts, where somebody asks and it was heard."""
        is_asked = "scores" in self.store.hints or self.recorder is not None
        if not is_asked or call.router_logits is None:
            return None
        return gate_scores(_narrow(call.router_logits))

    def _importance(self, call: LayerCall) -> np.ndarray | None:
        if self.attention is None or self.phase != "prompt":
            return None
        received = self.attention.take(call.layer).reshape(-1)  # [T]
        return token_importance(call.hidden.float().numpy(), received.numpy())

    def _worth(self, call: LayerCall) -> np.ndarray | None:
        masks = self.policy.masks
        if not masks:
            return None
        worth = slot_worth(masks[call.layer], call.hidden.float(), call.index, call.weight)
        found: np.ndarray = worth.numpy()
        return found

    def _routing(self, call: LayerCall) -> Routing:
        n_tokens = call.index.shape[0]
        score = logits = None
        policy = self.policy.policy
        if policy.needs_logits or policy.needs_score:
            assert call.router_logits is not None, "the router's hook did not answer"
            logits = _narrow(call.router_logits)
            if policy.needs_score:
                rule = self.policy.rules[call.layer]
                score = _narrow(rule.selection_scores(call.router_logits))
        return Routing(
            layer=call.layer,
            index=call.index.numpy(),
            weight=call.weight.to(torch.float32).numpy(),
            score=score,
            logits=logits,
            sequence=np.repeat(np.arange(self.n_sequences), n_tokens // self.n_sequences),
            importance=self._importance(call),
            worth=self._worth(call),
        )


def _numbers(answers: Answers, *, n_experts: int) -> np.ndarray:
    """Number experts as `ExpertLevels` does, [T, K']; -1 stays where a slot is empty."""
    if answers.level is None:
        return answers.expert
    numbered = answers.level * n_experts + answers.expert
    result: np.ndarray = np.where(answers.expert < 0, -1, numbered)
    return result


def _narrow(scores: torch.Tensor) -> np.ndarray:
    """Round to float16 as the trace of a profile does; what would overflow stays finite."""
    limit = torch.finfo(torch.float16).max
    rounded: np.ndarray = scores.clamp(-limit, limit).to(torch.float16).numpy()
    return rounded
