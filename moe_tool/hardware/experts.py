"""Time of one expert call by weight width, number of tokens and number of threads."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from moe_tool.artifacts.hardware_profile import BITS, Bits, ExpertSpeed
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.experts.linear import FEW_TOKENS
from moe_tool.hardware.synthetic_records import cut_records, record_bytes
from moe_tool.hardware.timing import median_seconds
from moe_tool.native.kernels import is_native, set_threads
from moe_tool.progress import SILENT, Progress

Shape = tuple[int, int]
"""(H, I): hidden and inner width of an expert"""
_SHAPES: tuple[Shape, Shape] = ((1024, 1024), (2048, 4096))
_TORCH_SHAPES: tuple[Shape, Shape] = ((512, 512), (1024, 2048))
"""Shapes of a quarter of the weights: torch needs a second for some calls at `_SHAPES`"""
_TINY_SHAPE: Shape = (64, 64)
"""Shape of 24 KB at 16 bits, whose time is almost all call overhead"""
_TINY_REPETITIONS = 25
_LEAST_S = 1e-9


class SiluGatedModule:
    """Stand-in for transformers' experts module, as far as `expert_forward` uses it."""

    has_gate = True
    has_post_expert_norm = False

    def _apply_gate(self, product: torch.Tensor) -> torch.Tensor:
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate) * up


def measure_experts(
    block: torch.Tensor,
    *,
    threads: Sequence[int],
    tokens: Sequence[int],
    repetitions: int,
    budget_s: float,
    shapes: tuple[Shape, Shape] | None = None,
    progress: Progress = SILENT,
) -> tuple[ExpertSpeed, ...]:
    """Time experts whose weights come from memory; sets the threads of the kernels and of torch.

    Args:
        block: as `make_block` returns it, several times the last-level cache.
        repetitions: maximum for each call.
        budget_s: seconds after which no other repetition of a call begins.
        shapes: two shapes to fit through, the smaller first; None: the defaults, smaller where
            torch computes.
    """
    shapes = shapes or (_SHAPES if is_native() else _TORCH_SHAPES)
    rows = []
    progress.begin("compute experts", len(BITS) * len(threads) * len(tokens), "kinds of call")
    with torch.inference_mode():
        for bits in BITS:
            sizes = [record_bytes(bits, *shape) for shape in shapes]
            calls = [_calls(block, bits, shape) for shape in shapes]
            tiny = _calls(block, bits, _TINY_SHAPE)
            for n_threads, n_tokens in itertools.product(threads, tokens):
                use_threads(n_threads, n_tokens)
                seconds = median_seconds(
                    [call(n_tokens) for call in calls],
                    repetitions=repetitions,
                    budget_s=2 * budget_s,
                )
                # Timed alone: beside larger calls its code would leave the caches, where a model of
                # tiny experts keeps it.
                (tiny_s,) = median_seconds(
                    [tiny(n_tokens)], repetitions=_TINY_REPETITIONS, budget_s=budget_s
                )
                fixed_s, bytes_per_s = fit_two(sizes, seconds)
                rows.append(
                    ExpertSpeed(
                        bits=bits,
                        tokens=n_tokens,
                        threads=n_threads,
                        fixed_s=fixed_s,
                        bytes_per_s=bytes_per_s,
                        fitted_from_bytes=sizes[0],
                        tiny_s=tiny_s,
                    )
                )
                progress.advance()
    progress.end()
    return tuple(rows)


def use_threads(n_threads: int, n_tokens: int) -> None:
    """Set threads as a session does: torch gets one where the kernels compute."""
    set_threads(n_threads)
    torch.set_num_threads(1 if is_native() and n_tokens <= FEW_TOKENS else n_threads)


def fit_two(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return (fixed seconds, bytes per second) of the line through two points.

    Where noise makes the fixed part negative or the larger point faster, the fixed part is 0 and
    the line goes through the larger point.

    Args:
        sizes: bytes, the smaller first.
    """
    (small, large), (fast, slow) = sizes, seconds
    slow = max(slow, _LEAST_S)
    if slow - fast > _LEAST_S:
        bytes_per_s = (large - small) / (slow - fast)
        fixed_s = fast - small / bytes_per_s
        if fixed_s >= 0:
            return fixed_s, bytes_per_s
    return 0.0, large / slow


def _calls(
    block: torch.Tensor, bits: Bits, shape: Shape
) -> Callable[[int], Callable[[], torch.Tensor]]:
    """Return a maker of calls for a number of tokens; every call computes the next record."""
    module = SiluGatedModule()
    turns = itertools.cycle(cut_records(block, bits, *shape))

    def make(n_tokens: int) -> Callable[[], torch.Tensor]:
        x = torch.randn(n_tokens, shape[0], generator=torch.Generator().manual_seed(0))
        return lambda: expert_forward(module, next(turns), x)

    return make
