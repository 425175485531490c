"""How long a prompt takes until its first token is chosen."""

from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import Bits, SkeletonBits
from moe_tool.planning.model_costs import ModelCosts
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.simulator.access_trace import AccessTrace
from moe_tool.simulator.profile_trace import PROMPT_TOKENS
from moe_tool.simulator.simulate import Budget, Machine, simulate_prompts


def seconds_to_first_token(
    prompts: tuple[AccessTrace, int],
    choice: EvictionChoice,
    budget: Budget,
    machine: Machine,
    costs: ModelCosts,
    hardware: HardwareProfile,
    *,
    shape: MoeShape,
    bits: Bits,
    skeleton_bits: SkeletonBits,
    n_tokens: int,
) -> float:
    """Return the prediction for a prompt of so many tokens, from the profile's own chunks.

    Every chunk computes what it names, each expert on its share of the tokens, while what is
    missing is read; the longer of the two counts.
    """
    trace, n_traced = prompts
    if not n_traced:
        return 0.0
    row = simulate_prompts(trace, n_traced, [choice], [budget], machine)[0]
    per_call = len(trace.keys) / max(1, trace.n_calls)
    chunk = min(n_tokens, PROMPT_TOKENS)
    n_threads = hardware.cores
    each = max(1, round(chunk * shape.top_k / max(1.0, per_call)))
    experts_s = per_call * hardware.expert_seconds(bits, costs.record_bytes, each, n_threads)
    matrices_s = hardware.expert_seconds(skeleton_bits, costs.matrix_bytes, chunk, n_threads)
    n_layers = len(shape.layers)
    compute_s = n_layers * (experts_s + costs.calls.layer_s) + matrices_s
    read_s = row.bytes_per_token * chunk / costs.record_bytes * costs.calls.read_s
    return -(-n_tokens // chunk) * max(compute_s, read_s)
