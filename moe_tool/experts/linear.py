"""The product x @ weight.T over a weight as it lies in a record.

This is the definition that a native kernel with the same signature has to agree with. Weights that
are not float32 are expanded in blocks of rows into one scratch block, so a layer needs no float32
copy of an expert.

Measured on a 2-core Xeon (AVX-512), one thread, [14336, 4096], one token, milliseconds: float32 15,
bfloat16 22, 8 bits 24, 4 bits 34. Other ways to expand 4 bits took 1.1 (a lookup table of 256
pairs), 1.3 (int8 * float32 type promotion) and 1.5 (one small product per group) times as long.
Blocks of 2**18 weights stay in the second-level cache; four times that takes 1.3 times as long.
"""

import torch
import torch.nn.functional as F

from moe_tool.quantization.weights import FloatWeight, IntegerWeight

_FEW_TOKENS = 16
"""Up to here expanding the weight costs most, beyond it the product, which likes large blocks."""
_SMALL_BLOCK = 2**18
_LARGE_BLOCK = 2**20
_TOP_BITS = -0x78
"""The bits 0x88 as an int8"""


@torch.no_grad()
def linear(
    x: torch.Tensor, weight: FloatWeight | IntegerWeight, bias: FloatWeight | None = None
) -> torch.Tensor:
    """Return x @ weight.T + bias in float32.

    A float32 weight goes to `F.linear` as it is, so the result is that of the ordinary model bit
    for bit. The result is a function of values, shapes and number of threads alone.

    Args:
        x: [n, in] float32.
        weight: [out, in].
        bias: [out], any float dtype.

    Returns:
        [n, out] float32.
    """
    if isinstance(weight, FloatWeight):
        if weight.values.dtype == torch.float32:
            out = F.linear(x, weight.values)
        else:
            out = _linear_narrow_float(x, weight.values)
    elif weight.width_bits == 8:
        out = _linear_8_bits(x, weight)
    else:
        out = _linear_4_bits(x, weight)
    # Added afterwards, as the models with biases do: a fused bias rounds differently.
    return out if bias is None else out.add_(bias.values.to(torch.float32))


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


def _linear_8_bits(x: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
    codes = weight.codes.view(torch.int8)  # [out, in]
    n_outputs, n_inputs = codes.shape
    out = x.new_empty(x.shape[0], n_outputs)
    rows = _rows_per_block(x.shape[0], n_outputs, n_inputs)
    scratch = x.new_empty(rows, n_inputs)
    for start in range(0, n_outputs, rows):
        block = codes[start : start + rows]
        expanded = scratch[: block.shape[0]].copy_(block)
        scales = weight.scales[start : start + rows].to(torch.float32)  # [rows, G]
        _scale_groups(expanded, scales, weight.group)
        torch.mm(x, expanded.T, out=out[:, start : start + rows])
    return out


def _linear_4_bits(x: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
    """Expand low and high nibbles into two planes and reorder x instead of interleaving the weight.

    Byte c of a row holds inputs 2c (low nibble) and 2c + 1 (high nibble), each a code plus 8. With
    the top bit of both flipped they are two's complement, and a nibble in the high half of an int8
    is worth 16 times its code: the scale takes the 16 back, which is exact in float32.
    """
    n_outputs, n_bytes = weight.codes.shape
    if weight.group % 2:
        raise ValueError(f"a group of {weight.group} inputs splits a byte")
    codes = weight.codes.view(torch.int8)
    even_then_odd = _split_even_odd(x, n_bytes)  # [n, 2 * bytes]
    out = x.new_empty(x.shape[0], n_outputs)
    rows = _rows_per_block(x.shape[0], n_outputs, 2 * n_bytes)
    scratch = x.new_empty(rows, 2, n_bytes)
    signed, nibbles = torch.empty(2, rows, n_bytes, dtype=torch.int8)
    for start in range(0, n_outputs, rows):
        block = codes[start : start + rows]
        n_rows = block.shape[0]
        expanded = scratch[:n_rows]
        torch.bitwise_xor(block, _TOP_BITS, out=signed[:n_rows])
        expanded[:, 0].copy_(torch.bitwise_left_shift(signed[:n_rows], 4, out=nibbles[:n_rows]))
        expanded[:, 1].copy_(torch.bitwise_and(signed[:n_rows], -16, out=nibbles[:n_rows]))
        scales = weight.scales[start : start + rows].to(torch.float32).div_(16)  # [rows, G]
        _scale_groups(expanded, scales[:, None], weight.group // 2)
        torch.mm(even_then_odd, expanded.view(n_rows, -1).T, out=out[:, start : start + rows])
    return out


def _split_even_odd(x: torch.Tensor, n_bytes: int) -> torch.Tensor:
    n_tokens, n_inputs = x.shape
    if n_inputs < 2 * n_bytes:  # the pad nibble of an odd row meets a zero
        x = F.pad(x, (0, 2 * n_bytes - n_inputs))
    return x.view(n_tokens, n_bytes, 2).transpose(1, 2).reshape(n_tokens, 2 * n_bytes)


def _scale_groups(expanded: torch.Tensor, scales: torch.Tensor, group: int) -> None:
    """Multiply [..., in] by scales [..., G] in place; the last group may be short."""
    n_full = expanded.shape[-1] // group
    full = expanded[..., : n_full * group].view(*expanded.shape[:-1], n_full, group)
    full.mul_(scales[..., :n_full, None])
    if n_full < scales.shape[-1]:
        expanded[..., n_full * group :].mul_(scales[..., n_full:])


def _rows_per_block(n_tokens: int, n_outputs: int, n_inputs: int) -> int:
    block = _SMALL_BLOCK if n_tokens <= _FEW_TOKENS else _LARGE_BLOCK
    return min(n_outputs, max(1, block // n_inputs))
