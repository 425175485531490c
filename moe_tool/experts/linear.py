"""Product x @ weight.T over a weight in its stored form.

For integer weights, tokens are rounded to int8 per group of inputs, as in the compiled kernels; the
torch twin here is the definition that they have to match. Weights narrower than float32 are
expanded in blocks of rows into one scratch block, so that no float32 copy of an expert is needed.
"""

import torch
import torch.nn.functional as F

from moe_tool.native.kept import INTEGER_KINDS, is_computed, token_group
from moe_tool.native.kernels import NativeLinear, are_tokens_int8, decode_kept, is_native
from moe_tool.quantization.bit_packing import ROWS, n_row_blocks
from moe_tool.quantization.kept_codes import KeptWeight, kept_product
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.tokens import round_trip_tokens
from moe_tool.quantization.weights import AnyWeight, FloatWeight, IntegerWeight

FEW_TOKENS = 32
"""Up to here reading the weight dominates; beyond, the product does, where torch is faster for
float weights"""
_SMALL_BLOCK = 2**18
"""Weights that stay in the second-level cache; four times that took 1.3 times as long"""
_LARGE_BLOCK = 2**20


@torch.no_grad()
def linear(
    x: torch.Tensor,
    weight: AnyWeight,
    bias: FloatWeight | None = None,
    *,
    is_expert: bool = True,
) -> torch.Tensor:
    """Return x @ weight.T + bias, [n, out] float32.

    A float32 weight is passed to `F.linear`, so that the result equals the ordinary model's bit for
    bit. The kernels' products do not depend on the number of threads or of tokens; torch's may.

    Args:
        x: [n, in] float32.
        weight: [out, in].
        bias: [out], any float dtype.
        is_expert: whether tokens are rounded for kept codes if a run asks for int8 activations.
    """
    if computes_natively(weight, x.shape[0], is_expert=is_expert):
        rounded = is_expert and are_tokens_int8()
        return NativeLinear(weight, bias, int8_tokens=rounded).forward(x)
    if isinstance(weight, IntegerWeight):
        out = _linear_integer(x, weight)
    elif isinstance(weight, KeptWeight):
        out = _linear_kept(x, weight, is_rounded=is_expert and _are_rounded(weight))
    elif weight.values.dtype == torch.float32:
        out = F.linear(x, weight.values)
    else:
        out = _linear_narrow_float(x, weight.values)
    # Added afterwards, as the models with biases do: a fused bias rounds differently.
    return out if bias is None else out.add_(bias.values.to(torch.float32))


def expanded(weight: FloatWeight | KeptWeight) -> FloatWeight:
    """Return a matrix of kept codes in float32, and a weight of floats itself."""
    if isinstance(weight, FloatWeight):
        return weight
    n_outputs, n_inputs = weight.shape
    if is_native() and is_computed(weight.group[1], n_inputs):
        return FloatWeight(values=decode_kept(weight, 0, n_outputs))
    out = torch.empty(n_outputs, n_inputs)
    rows = max(1, _LARGE_BLOCK // n_inputs)
    for first in range(0, n_outputs, rows):
        out[first : first + rows] = weight.decode(first, min(first + rows, n_outputs))
    return FloatWeight(values=out)


def computes_natively(weight: AnyWeight, n_tokens: int, *, is_expert: bool = True) -> bool:
    """Return whether the compiled kernels compute a product of `n_tokens` tokens, see `linear`."""
    if not is_native():
        return False
    if isinstance(weight, IntegerWeight):
        return True
    if isinstance(weight, KeptWeight):
        return n_tokens <= FEW_TOKENS or (is_expert and _are_rounded(weight))
    return weight.values.dtype != torch.float32 and n_tokens <= FEW_TOKENS


def _linear_narrow_float(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    n_outputs, n_inputs = values.shape
    out = x.new_empty(x.shape[0], n_outputs)
    rows = _rows_per_block(x.shape[0], n_outputs, n_inputs)
    scratch = x.new_empty(rows, n_inputs)
    for start in range(0, n_outputs, rows):
        block = values[start : start + rows]
        expanded = scratch[: block.shape[0]].copy_(block)
        torch.mm(x, expanded.T, out=out[:, start : start + rows])
    return out


def _linear_integer(x: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
    n_outputs, n_inputs = weight.shape
    tokens = round_trip_tokens(x, weight.group)
    out = x.new_empty(x.shape[0], n_outputs)
    blocks = max(1, _rows_per_block(x.shape[0], n_outputs, n_inputs) // ROWS)
    for first in range(0, n_row_blocks(n_outputs), blocks):
        part = _row_blocks(weight, first, first + blocks)
        start = first * ROWS
        torch.mm(tokens, dequantize(part).T, out=out[:, start : start + part.n_outputs])
    return out


def _are_rounded(weight: KeptWeight) -> bool:
    return are_tokens_int8() and weight.kind in INTEGER_KINDS


def _linear_kept(x: torch.Tensor, weight: KeptWeight, *, is_rounded: bool) -> torch.Tensor:
    if is_rounded:
        x = round_trip_tokens(x, token_group(weight.group[1]))
    return kept_product(x, weight, decode=decode_kept if is_native() else KeptWeight.decode)


def _row_blocks(weight: IntegerWeight, first: int, stop: int) -> IntegerWeight:
    """Return some blocks of 16 outputs; views."""
    n_blocks = n_row_blocks(weight.n_outputs)
    return IntegerWeight(
        planes=tuple(plane.view(n_blocks, -1)[first:stop].view(-1) for plane in weight.planes),
        scales=weight.scales[first:stop],
        zeros=None if weight.zeros is None else weight.zeros[first:stop],
        width_bits=weight.width_bits,
        of_bits=weight.of_bits,
        group=weight.group,
        n_outputs=min(weight.n_outputs - first * ROWS, (stop - first) * ROWS),
        n_inputs=weight.n_inputs,
    )


def _rows_per_block(n_tokens: int, n_outputs: int, n_inputs: int) -> int:
    block = _SMALL_BLOCK if n_tokens <= FEW_TOKENS else _LARGE_BLOCK
    return min(n_outputs, max(1, block // n_inputs))
