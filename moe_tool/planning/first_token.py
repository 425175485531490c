"""How long a prompt takes until its first token is chosen."""

from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.planning.candidate import PackedExperts
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.eviction import parse_eviction
from moe_tool.simulator.profile_trace import PROMPT_TOKENS
from moe_tool.simulator.simulate import Budget, simulate_prompts


def seconds_to_first_token(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    experts: PackedExperts,
    *,
    eviction: str,
    n_tokens: int,
) -> float:
    """Return the prediction for a prompt of so many tokens, from the profile's own chunks.

    Every chunk computes what it names, each expert on its share of the tokens, while what is
    missing is read; the longer of the two counts.
    """
    trace, n_traced = sources.prompts
    if not n_traced:
        return 0.0
    shape, costs = sources.profile.header.shape, experts.costs
    budget = Budget(label=str(request.memory), n_slots=experts.replayed_slots)
    choices = [parse_eviction(eviction)]
    row = simulate_prompts(trace, n_traced, choices, [budget], experts.machine)[0]
    per_call = len(trace.keys) / max(1, trace.n_calls)
    chunk, n_threads = min(n_tokens, PROMPT_TOKENS), hardware.cores
    each = max(1, round(chunk * shape.top_k / max(1.0, per_call)))
    experts_s = per_call * hardware.expert_seconds(
        experts.compute_bits, costs.record_bytes, each, n_threads
    )
    matrices_s = hardware.expert_seconds(
        request.skeleton_bits, costs.matrix_bytes, chunk, n_threads
    )
    compute_s = len(shape.layers) * (experts_s + costs.calls.layer_s) + matrices_s
    read_s = row.bytes_per_token * chunk / costs.record_bytes * costs.calls.read_s
    return -(-n_tokens // chunk) * max(compute_s, read_s)
