"""Notes on a plan: reasons for the candidate, refused precisions, limits of the prediction."""

from collections.abc import Mapping, Sequence

from moe_tool.artifacts.pack_plan import Bits
from moe_tool.artifacts.simulation_report import PrefetchRow
from moe_tool.formats.profile_hdf5 import ProfileHeader
from moe_tool.planning.candidate import Candidate
from moe_tool.planning.make_pack_plan import PREDICTION_ERROR
from moe_tool.planning.model_costs import native_bits, useful_widths
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.quantizers.registry import QUANTIZERS

_MOSTLY_FIXED = 0.5


def bit_notes(
    request: PlanRequest, losses: Mapping[Bits, float], unfit: Sequence[Bits]
) -> list[str]:
    """Return why precisions are refused: predicted losses above the limit, or `unfit` for the
    budget."""
    notes = [
        f"{bits} bits: predicted to add {loss:.1%} perplexity, {request.max_loss:.1%} are allowed"
        for bits, loss in losses.items()
        if loss > request.max_loss
    ]
    if unfit:
        notes.append(f"{', '.join(unfit)}: does not fit into {request.memory}")
    return notes


def kept_notes(header: ProfileHeader, widths: Sequence[int]) -> list[str]:
    """Return which of the widths are left out because the checkpoint's codes have no more bits."""
    useful = useful_widths(header, widths)
    left_out = [str(width) for width in widths if width not in useful]
    if header.kept is None or not left_out:
        return []
    return [
        f"left out: {' and '.join(left_out)} bits: the checkpoint's {header.kept.name} codes, "
        f"{float(native_bits(header)):.4g} bits a weight with their scales, are kept without loss"
    ]


def limit_note(candidate: Candidate) -> str:
    """Return a note on the expected divergence of a candidate under a limit."""
    experts, lossy = candidate.experts, candidate.lossy
    if lossy is None:
        return f"every miss is read: expected KL {candidate.nats_per_token:.2g}, that of the bits"
    replayed, exact = lossy.replayed, candidate.exact.rows[0].tokens_per_second
    return (
        f"lossy: expected KL {candidate.nats_per_token:.2g} nats per token, {experts.nats:.2g} "
        f"of it the experts' {experts.bits} bits; {replayed.answered_otherwise:.1f} slots of a "
        f"token are answered by something cheaper, {replayed.hit_rate:.0%} by the expert in memory;"
        f" with every miss read it would be {exact:.2f} tokens/s. Prices, not measurements: "
        "moe-tool calibrate measures"
    )


def robust_note(share: float, domains: Sequence[str]) -> str:
    """Return a note on the use that chose the residents."""
    return (
        f"residents chosen by {1 - share:.0%} mean use and {share:.0%} worst case of "
        f"{', '.join(domains)} and uniform use (--robust {share:g})"
    )


def caches_note(candidate: Candidate, *, is_chosen: bool) -> str:
    """Return a note on the caches of two forms."""
    lossy, caches = candidate.lossy, candidate.caches
    assert lossy is not None and caches is not None
    found = (
        f"caches of {candidate.experts.bits} and {lossy.replicas} bits under {lossy.policy.name}: "
        f"{candidate.tokens_per_second:.2f} tokens/s at an expected KL of "
        f"{candidate.nats_per_token:.2g}"
    )
    return f"{found}, as planned" if is_chosen else f"{found}; not chosen"


def eviction_note(candidate: Candidate) -> str:
    """Return a note that compares the chosen eviction policy with others."""
    exact = candidate.exact
    best, lru, bound = exact.rows[0], exact.lru, exact.bound
    if not lru.bytes_per_token:
        return f"eviction {best.eviction}: nothing is read once the cache is full"
    share = 1 - best.bytes_per_token / lru.bytes_per_token
    less = "as much as lru" if abs(share) < 0.005 else f"{share:.0%} less than lru"
    over = ""
    if bound.bytes_per_token:
        over = f", {best.bytes_per_token / bound.bytes_per_token:.2f} times the bound"
    behind = "; ".join(
        f"{row.eviction} {row.bytes_per_token / best.bytes_per_token:.2f} times as much"
        for row in exact.rows[1:3]
        if best.bytes_per_token
    )
    return f"eviction {best.eviction}: reads {less}{over}" + (f"; {behind}" if behind else "")


def overhead_notes(candidate: Candidate, n_layers: int) -> list[str]:
    """Return a warning if per-layer overhead dominates: `PREDICTION_ERROR` does not apply then."""
    share = n_layers * candidate.experts.machine.costs.layer_s
    share *= candidate.exact.rows[0].tokens_per_second
    if share < _MOSTLY_FIXED:
        return []
    return [
        f"a tiny model: {min(share, 1.0):.0%} of a token's time is Python between its matrices, "
        f"which the load of the machine changes by more than {PREDICTION_ERROR:.0%}"
    ]


def prefetch_note(row: PrefetchRow) -> str:
    """Return a note on whether prefetch pays, with its figures."""
    per_byte = row.bytes_per_saved_byte
    cost = "saves no byte" if per_byte is None else f"reads {per_byte:.1f} bytes per byte saved"
    verdict = "pays" if row.pays else "does not pay"
    change = "less" if row.stall_saved_ms >= 0 else "more"
    return (
        f"prefetch {verdict}: {row.accuracy:.0%} of next-layer's experts are wanted, it {cost}, "
        f"{abs(row.stall_saved_ms):.2f} ms {change} stall per token"
    )


def mixed_notes(candidate: Candidate) -> list[str]:
    """Return notes on experts of mixed widths."""
    notes, experts = [], candidate.experts
    if not experts.is_resident:
        n_read = experts.n_stored - experts.memory.n_slots
        notes.append(f"{n_read} experts are read when they are wanted")
    n_removed = experts.n_experts - experts.n_stored
    if n_removed:
        notes.append(f"{n_removed} experts are removed: their bytes are worth more elsewhere")
    if QUANTIZERS[experts.quantizer].is_profiled:
        notes.append("errors are the profile's of rounding to nearest; --quantizer gptq has less")
    return notes
