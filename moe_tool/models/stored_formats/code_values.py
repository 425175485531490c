"""Values of codes in float32: lookup of codes narrower than a byte, and scales of groups."""

from collections.abc import Iterator

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Value of each 4-bit float: sign, two bits of exponent, one of mantissa"""


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of packed codes.

    Args:
        codes: [..., n] uint8, lowest bits first.
        table: value of each code, 4, 16 or 256 float32.

    Returns:
        [..., n * codes per byte]; beside it and `codes`, 4 bytes for each byte are held.
    """
    width = len(table).bit_length() - 1
    shifts = torch.arange(0, 8, width, dtype=torch.int32)
    of_byte = table[(torch.arange(256, dtype=torch.int32)[:, None] >> shifts) & (len(table) - 1)]
    values = of_byte.index_select(0, codes.reshape(-1).to(torch.int32))
    return values.view(*codes.shape[:-1], codes.shape[-1] * len(shifts))


def lookup_bytes(n_code_bytes: int, n_weights: int) -> int:
    """Return the bytes that `look_up` holds, with its codes and its result."""
    return 5 * n_code_bytes + 4 * n_weights


def scale_groups(
    values: torch.Tensor,
    scale: torch.Tensor,
    group: tuple[int, int],
    *,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make each group of a matrix (value - zero) * scale, in place, and return the matrix.

    Args:
        values: [out, in] float32.
        scale: [ceil(out / rows), ceil(in / columns)] float32.
        group: rows and columns of a group; the last ones may be cut off by the matrix's edge.
        zero: shaped as `scale`; None: zeros.
    """
    for rows, of_rows, n_rows in _spans(values.shape[0], group[0]):
        for columns, of_columns, n_columns in _spans(values.shape[1], group[1]):
            part = values[rows, columns]
            blocks = part.view(-1, n_rows, part.shape[1] // n_columns, n_columns)
            if zero is not None:
                blocks.sub_(zero[of_rows, of_columns][:, None, :, None])
            blocks.mul_(scale[of_rows, of_columns][:, None, :, None])
    return values


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return float32 2 ** (e - 127) of uint8 exponents; NaN for 255."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.float32)


def _spans(size: int, step: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield whole groups, then what is left: the span, its groups, the length of each."""
    n_whole = size // step
    if n_whole:
        yield slice(0, n_whole * step), slice(0, n_whole), step
    if size % step:
        yield slice(n_whole * step, size), slice(n_whole, n_whole + 1), size % step
