"""Request for a plan, and the refusals that need nothing but the request."""

from dataclasses import dataclass

from moe_tool.artifacts.pack_plan import Bits, Quantizer, SkeletonBits
from moe_tool.budget.request import EVERY_EXPERT, MemoryRequest
from moe_tool.errors import UsageError
from moe_tool.planning.allocate_bits import WIDTHS
from moe_tool.planning.published_bits import PublishedCost

_MAX_CONTEXT = 2**31
_MAX_KL = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Budget and limits of a plan."""

    memory: MemoryRequest = EVERY_EXPERT
    bits: Bits | None = None
    """Precision of every expert, or mixed; None: the fastest within the limits"""
    average_bits: float | None = None
    """Average bits per weight of mixed widths; None: by memory or limit"""
    cost: PublishedCost | None = None
    """Program that hands out average bits as published; None: the least expected divergence"""
    quantizer: Quantizer = "rtn"
    skeleton_bits: SkeletonBits = "native"
    max_loss: float = 0.01
    """Relative increase of perplexity that fewer bits may cause, if misses are answered exactly"""
    max_kl: float | None = None
    """Limit of divergence by bits and lossy answers, nats per token; None: misses are answered
    exactly"""
    robust: float | None = None
    """Share of the worst case over domains in the use that residents are chosen by; None: by
    leaving each domain out in turn"""
    context: int = 4096

    @property
    def is_mixed(self) -> bool:
        """Whether widths are mixed."""
        return self.bits == "mixed" or self.average_bits is not None


def check_request(request: PlanRequest) -> None:
    """Refuse a request that no model could meet.

    Raises:
        UsageError: a number is out of range, or options contradict each other.
    """
    if not 0 <= request.max_loss < 100 or not 1 <= request.context <= _MAX_CONTEXT:
        raise UsageError(
            f"--max-loss {request.max_loss:.4g}, --context {request.context}: not possible",
            hint="--max-loss 1% --context 4096",
        )
    if request.max_kl is not None and not 0 <= request.max_kl < _MAX_KL:
        raise UsageError(f"--max-kl {request.max_kl:.4g}: not possible", hint="--max-kl 0.01")
    if request.robust is not None and not 0 <= request.robust <= 1:
        raise UsageError(f"--robust {request.robust:.4g}: not possible", hint="--robust 0.5")
    if request.robust and (request.max_kl is None or request.is_mixed):
        raise UsageError(
            f"--robust {request.robust:g} is for residents that answer misses, and here none do",
            hint="--max-loss 2%, without mixed bits",
        )
    if request.memory.kind == "auto":
        raise UsageError(
            "--memory auto: what will be free where the plan runs is not known",
            hint="--memory 8GiB, or 100% for all experts",
        )
    if request.cost is not None and request.average_bits is None:
        raise UsageError(
            "--cost published spends a budget of bits, which is missing", hint="--average-bits 2.5"
        )
    if request.is_mixed:
        _check_mixed(request)
    elif request.quantizer != "rtn":
        raise UsageError(
            "--quantizer is for mixed bits; pack has its own --quantizer",
            hint="--average-bits 2.5, or --bits mixed with --memory SIZE",
        )


def _check_mixed(request: PlanRequest) -> None:
    average = request.average_bits
    if request.bits not in (None, "mixed"):
        raise UsageError(
            f"--bits {request.bits} and --average-bits contradict", hint="give one of them"
        )
    if average is not None and not 0 < average <= WIDTHS[-1]:
        raise UsageError(f"--average-bits {average:g}: not possible", hint="--average-bits 2.5")
    has_size = request.memory.kind == "bytes"
    if not has_size and request.memory != EVERY_EXPERT:
        raise UsageError(
            f"--memory {request.memory}: with mixed bits a share of the experts has no size",
            hint="--memory SIZE in bytes, or leave it out with --average-bits",
        )
    if not has_size and average is None and request.max_kl is None:
        raise UsageError(
            "--bits mixed requires a limit of bytes, bits or loss",
            hint="--memory SIZE, --average-bits 2.5 or --max-kl 0.01",
        )
