"""Conversion of the chosen candidate to a plan: how to pack, how to run, what to expect."""

import math

from moe_tool import __version__
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import PackPlan, PlanLine, PlannedForm, PlanPrediction
from moe_tool.artifacts.precision import replica_precisions
from moe_tool.planning.candidate import Candidate
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.simulator.profile_trace import PROMPT_TOKENS
from moe_tool.simulator.simulate import Budget, simulate_prompts

PREDICTION_ERROR = 0.4
"""Relative error of tokens per second, found by benchmarks/prediction_error.py on a shared
machine"""
_FIRST_PROMPT_TOKENS = 512


def make_pack_plan(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    candidate: Candidate,
    *,
    prefetches: bool,
) -> PackPlan:
    """Return the plan of the chosen candidate; `prefetches`: prefetch pays."""
    header, experts, lossy = sources.profile.header, candidate.experts, candidate.lossy
    best, has_kl = candidate.exact.rows[0], request.max_kl is not None or request.is_mixed
    decoding = best if lossy is None else lossy.replayed
    return PackPlan(
        tool_version=__version__,
        identity=header.identity,
        profile_sha256=sources.profile.sha256,
        hardware=hardware.name,
        memory_bytes=experts.memory.budget_bytes,
        context=request.context,
        bits=experts.bits,
        expert_bits=experts.expert_bits,
        quantizer=experts.quantizer,
        skeleton_bits=request.skeleton_bits,
        eviction=_eviction(candidate),
        prefetch="next-layer" if prefetches else "none",
        policy=None if lossy is None else lossy.policy.name,
        residency=None if lossy is None or lossy.caches is None else "cache",
        replicas="" if lossy is None else lossy.replicas,
        max_kl=None if lossy is None else request.max_kl,
        forms=_forms(candidate),
        robust=0.0 if lossy is None else lossy.robust,
        prediction=PlanPrediction(
            tokens_per_second=candidate.tokens_per_second,
            error=PREDICTION_ERROR,
            hit_rate=decoding.hit_rate,
            bytes_per_token=decoding.bytes_per_token,
            to_belady=best.to_belady if lossy is None else None,
            seconds_to_first_token=_seconds_to_first_token(sources, hardware, request, candidate),
            prompt_tokens=_FIRST_PROMPT_TOKENS,
            expert_slots=experts.memory.n_slots,
            loss=experts.loss,
            kl=candidate.nats_per_token if has_kl else None,
            kl_of_bits=experts.nats if has_kl else 0.0,
        ),
        lines=tuple(
            PlanLine(name=line.name, size_bytes=line.size_bytes) for line in experts.memory.lines
        ),
    )


def _eviction(candidate: Candidate) -> str:
    lossy = candidate.lossy
    if lossy is None or lossy.caches is None:
        return candidate.exact.choice.name
    return lossy.caches.eviction.name


def _forms(candidate: Candidate) -> tuple[PlannedForm, ...]:
    """Return the experts in memory by form under a lossy policy."""
    lossy = candidate.lossy
    if lossy is None:
        return ()
    names = (candidate.experts.bits, *(each.name for each in replica_precisions(lossy.replicas)))
    n_experts = candidate.experts.n_experts
    if lossy.caches is not None:
        return tuple(
            PlannedForm(
                role="replica" if at else "primary",
                precision=name,
                record_bytes=size,
                resident=(),
                n_disk_only=n_experts,
                cached=slots,
            )
            for at, (name, size, slots) in enumerate(
                zip(names, lossy.record_bytes, lossy.caches.slots, strict=True)
            )
        )
    assert lossy.residents is not None, "without caches there are residents"
    price = lossy.policy.values["nats-per-mb"]
    return tuple(
        PlannedForm(
            role="replica" if at else "primary",
            precision=name,
            record_bytes=size,
            resident=keys,
            # Primary records are read for prompts; only replicas of use are packed.
            n_disk_only=0 if at and math.isinf(price) else n_experts - len(keys),
        )
        for at, (name, size, keys) in enumerate(
            zip(names, lossy.record_bytes, lossy.residents.by_form, strict=True)
        )
    )


def _seconds_to_first_token(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    candidate: Candidate,
) -> float:
    """Return the predicted time of a prompt, by the profile's prompts in chunks.

    A chunk computes each expert on its share of the tokens while missing experts are read; the
    longer of the two counts.
    """
    trace, n_traced = sources.prompts
    if not n_traced:
        return 0.0
    experts, shape = candidate.experts, sources.profile.header.shape
    costs = experts.costs
    budget = Budget(label=str(request.memory), n_slots=experts.replayed_slots)
    choices = [candidate.exact.choice]
    row = simulate_prompts(trace, n_traced, choices, [budget], experts.machine)[0]
    per_call = len(trace.keys) / max(1, trace.n_calls)
    chunk, n_threads = min(_FIRST_PROMPT_TOKENS, PROMPT_TOKENS), hardware.cores
    each = max(1, round(chunk * shape.top_k / max(1.0, per_call)))
    experts_s = per_call * hardware.expert_seconds(
        experts.compute_bits, costs.record_bytes, each, n_threads
    )
    matrices_s = hardware.expert_seconds(
        request.skeleton_bits, costs.matrix_bytes, chunk, n_threads
    )
    compute_s = len(shape.layers) * (experts_s + costs.calls.layer_s) + matrices_s
    read_s = row.bytes_per_token * chunk / costs.record_bytes * costs.calls.read_s
    return -(-_FIRST_PROMPT_TOKENS // chunk) * max(compute_s, read_s)
