"""Ways of reading a large buffer; the fastest is what memory gives."""

import threading

import numpy as np
import torch
from interleaved import Call

SIZE_BYTES = 2**29
"""Beyond any cache"""
_ROW_FLOATS = 4096


def reading_calls(n_threads: int) -> dict[str, Call]:
    """Return calls that read SIZE_BYTES each with so many threads; torch's have to be set so."""
    buffer = torch.rand(SIZE_BYTES // 4 // _ROW_FLOATS, _ROW_FLOATS)
    vector = torch.rand(_ROW_FLOATS)
    flat = buffer.numpy().reshape(-1)
    parts = np.array_split(flat.view(np.int64), n_threads)
    return {
        "read: torch sum": buffer.sum,
        "read: torch fp32 GEMV": lambda: torch.mv(buffer, vector),
        "read: numpy int64 sum": lambda: _sum_parts(parts),
    }


def _sum_parts(parts: list[np.ndarray]) -> None:
    """numpy lets go of the interpreter while it sums."""
    others = [threading.Thread(target=part.sum) for part in parts[1:]]
    for thread in others:
        thread.start()
    parts[0].sum()
    for thread in others:
        thread.join()
