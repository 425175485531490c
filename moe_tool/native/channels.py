"""Products over an expert's channels, and reads of chosen channels, compiled if possible."""

import os
import struct

import numpy as np
import torch

from moe_tool.native import kernels
from moe_tool.native.kernels import Gate
from moe_tool.quantization.channels import ChannelWeight, row_bytes

MOST_TOKENS = 4
"""Tokens above which expanding the channels once is faster"""


def computes_channels(n_tokens: int) -> bool:
    """Return whether `native_channels` supports so many tokens."""
    return kernels.is_native() and n_tokens <= MOST_TOKENS


def native_channels(
    weight: ChannelWeight,
    gate: Gate,
    x: torch.Tensor,
    values: torch.Tensor,
    *,
    index: torch.Tensor | None,
    is_gate: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return the sum over channels of inner activation times column, float32 [n, H].

    Args:
        weight: all channels; those not in `index` may hold anything.
        x: [n, H] float32.
        values: [n, C] float32, outputs of the selector matrix.
        index: [C] int32, ascending channel numbers; None: all channels.
        is_gate: whether the selector is the gate, not the up projection.
        bias: [C] float32, bias of the matrix that is not the selector.

    Raises:
        ValueError: sizes that do not fit together.
    """
    n_tokens, n_channels = values.shape
    chunks = weight.chunks
    wanted = (weight.n_channels, 2 * row_bytes(weight.n_hidden, weight.width_bits, weight.group))
    is_sound = (
        tuple(chunks.shape) == wanted
        and chunks.is_contiguous()
        and x.shape == (n_tokens, weight.n_hidden)
        and (n_channels == weight.n_channels if index is None else index.shape == (n_channels,))
        and (bias is None or bias.shape == (n_channels,))
        and x.dtype == values.dtype == torch.float32
    )
    if index is not None and n_channels:
        is_sound &= index.dtype == torch.int32 and index.is_contiguous()
        is_sound &= int(index[0]) >= 0 and int(index[-1]) < weight.n_channels
    if not is_sound:
        raise ValueError("channels, tokens and their choice do not fit together")
    if not n_channels:  # an empty array has no address
        return torch.zeros(n_tokens, weight.n_hidden)
    x, values = x.contiguous(), values.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    described = struct.pack(
        "=4Q8i",
        chunks.data_ptr(), 0 if index is None else index.data_ptr(), values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        weight.n_channels, n_channels, weight.n_hidden, weight.width_bits, weight.group, is_gate,
        n_tokens, 0,
    )  # fmt: skip
    out = torch.empty(n_tokens, weight.n_hidden)
    kernels.compiled().channel_expert(described, gate.packed, x.data_ptr(), out.data_ptr())
    return out


def read_runs(file: int, start: int, runs: np.ndarray, out: torch.Tensor) -> int:
    """Copy parts of a file to the same offsets of a buffer; return the bytes read, fewer than asked
    for where the file ends.

    Args:
        start: file offset that corresponds to the beginning of `out`.
        runs: [n, 2] int64: offset and length of each part, within `out`.
        out: uint8, contiguous.

    Raises:
        OSError: the read fails.
        ValueError: a part ends beyond `out`.
    """
    runs = np.ascontiguousarray(runs, dtype=np.int64)
    if len(runs) and (runs.min() < 0 or int(runs.sum(axis=1).max()) > out.numel()):
        raise ValueError("a part ends beyond the buffer")
    if kernels.is_built():
        n_read: int = kernels.compiled().read_runs(
            file, start, runs.ctypes.data, len(runs), out.data_ptr()
        )
        return n_read
    total, view = 0, out.view(-1).numpy().data
    for offset, n_bytes in runs.tolist():
        done = 0
        while done < n_bytes:
            part = view[offset + done : offset + n_bytes]
            count = os.preadv(file, [part], start + offset + done)
            if count == 0:
                return total + done
            done += count
        total += done
    return total
