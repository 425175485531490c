"""Products of two-bit weights with two-bit tokens by table lookup (DeepGEMM, arXiv 2304.09049).

A code on either side selects an integer of its code book, uniform or not. The table holds the sum
of two products for every pair of weights and every pair of tokens: 16 x 16 sums, of which one byte
shuffle looks up those of 32 outputs. Sums are stored minus the smallest one, in digits narrow
enough that at least four can be added in a byte.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

TILE_ROWS = 128
"""Outputs per tile"""
QUAD = 4
"""Inputs whose weights share a byte"""
_CODES = 4
_DIGIT_BITS = 6
"""Maximum bits of a digit: four pairs of inputs are added in a byte"""
_BYTE = 255
_LARGEST_SUM = 2**31


@dataclass(frozen=True, slots=True, eq=False)
class PairWeights:
    """Matrix of two-bit codes."""

    codes: torch.Tensor
    """Packed codes, uint8 [tiles, quads, 128], byte r: output r of the tile; bits 2i and 2i + 1:
    input i of the quad. Padding has code 0."""
    n_outputs: int
    n_inputs: int


@dataclass(frozen=True, slots=True, eq=False)
class PairTokens:
    """Tokens as two-bit codes."""

    codes: torch.Tensor
    """Packed codes, uint8 [n, 2 quads]: bits 4 and 5 the first of two inputs, 6 and 7 the second"""
    n_inputs: int


@dataclass(frozen=True, slots=True, eq=False)
class PairTables:
    """Lookup tables of sums of two products, for integer code books."""

    planes: torch.Tensor
    """Digits of the sums, uint8 [digits, 16, 16], least significant first: by two token codes, then
    by two weight codes, the first of either pair in the lower bits"""
    digit_bits: int
    smallest: int
    """Smallest sum, subtracted from all of them"""
    filling: int
    """Product of code 0 with code 0, which padding adds"""

    @property
    def quads_per_widening(self) -> tuple[int, ...]:
        """Quads whose sum fits into a byte, for every digit."""
        return tuple(_BYTE // max(1, 2 * int(plane.max())) for plane in self.planes)

    def base(self, n_inputs: int) -> int:
        """Return the constant to add to a sum over so many inputs, padded to quads."""
        missing = -n_inputs % QUAD
        return (n_inputs + missing) // 2 * self.smallest - missing * self.filling


def pack_pair_weights(codes: torch.Tensor) -> PairWeights:
    """Pack uint8 [out, in] of codes below 4.

    Raises:
        ValueError: a code is larger, or there is no weight.
    """
    _check_codes(codes)
    n_out, n_in = codes.shape
    padded = F.pad(codes, (0, -n_in % QUAD, 0, -n_out % TILE_ROWS))
    tiles = padded.view(padded.shape[0] // TILE_ROWS, TILE_ROWS, -1, QUAD)
    packed = tiles[..., 0] | tiles[..., 1] << 2 | tiles[..., 2] << 4 | tiles[..., 3] << 6
    return PairWeights(packed.transpose(1, 2).contiguous(), n_out, n_in)


def pack_pair_tokens(codes: torch.Tensor) -> PairTokens:
    """Pack uint8 [n, in] of codes below 4.

    Raises:
        ValueError: a code is larger, or there is no input.
    """
    _check_codes(codes)
    padded = F.pad(codes, (0, -codes.shape[1] % QUAD))
    return PairTokens(padded[:, ::2] << 4 | padded[:, 1::2] << 6, codes.shape[1])


def pair_tables(weight_book: torch.Tensor, token_book: torch.Tensor) -> PairTables:
    """Return the tables of two code books.

    Args:
        weight_book: int8 [4], values of the weight codes, in any order.
        token_book: int8 [4], values of the token codes.

    Raises:
        ValueError: a code book is not int8 [4].
    """
    for book in (weight_book, token_book):
        if book.dtype != torch.int8 or tuple(book.shape) != (_CODES,):
            raise ValueError(f"a code book is {book.dtype} {tuple(book.shape)}, wanted int8 [4]")
    products = token_book.int()[:, None] * weight_book.int()[None, :]
    # [token 1, token 0, weight 1, weight 0]
    sums = products[None, :, None, :] + products[:, None, :, None]
    sums = sums.reshape(_CODES**2, _CODES**2)
    smallest = int(sums.min())
    bits = max(1, int(sums.max() - smallest).bit_length())
    n_digits = -(-bits // _DIGIT_BITS)
    digit_bits = -(-bits // n_digits)
    digits = [(sums - smallest) >> (digit_bits * d) & (2**digit_bits - 1) for d in range(n_digits)]
    return PairTables(
        torch.stack(digits).to(torch.uint8), digit_bits, smallest, int(products[0, 0])
    )


def check_pair_product(weights: PairWeights, tokens: PairTokens, tables: PairTables) -> None:
    """Check what the kernels rely on.

    Raises:
        ValueError: the sides differ in inputs, or a sum may not fit into 32 bits.
    """
    n_in = weights.n_inputs
    if tokens.n_inputs != n_in:
        raise ValueError(f"tokens have {tokens.n_inputs} inputs, the weights {n_in}")
    # A bound by sums of pairs, slightly too strict for few inputs.
    top = sum(int(plane.max()) << (tables.digit_bits * d) for d, plane in enumerate(tables.planes))
    if n_in * max(abs(tables.smallest), abs(tables.smallest + top)) >= 2 * _LARGEST_SUM:
        raise ValueError(f"a sum of {n_in} such products may not fit into 32 bits")


def look_up_pairs(weights: PairWeights, tokens: PairTokens, tables: PairTables) -> torch.Tensor:
    """Return the products, int32 [n, out], in slow torch code with the kernels' results.

    Raises:
        ValueError: see `check_pair_product`.
    """
    check_pair_product(weights, tokens, tables)
    sums = tables.smallest + sum(
        plane.int() << (tables.digit_bits * d) for d, plane in enumerate(tables.planes)
    )
    nibbles = torch.stack([weights.codes & 15, weights.codes >> 4], dim=2)
    nibbles = (
        nibbles.transpose(2, 3).transpose(1, 2).flatten(0, 1).flatten(1).long()
    )  # [rows, pairs]
    found = [sums[(row >> 4).long()[None], nibbles].sum(-1) for row in tokens.codes]
    total = torch.stack(found) if found else torch.zeros(0, nibbles.shape[0])
    missing = -weights.n_inputs % QUAD * tables.filling
    return (total[:, : weights.n_outputs] - missing).int()


def _check_codes(codes: torch.Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.ndim != 2 or not codes.shape[1]:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}, wanted uint8 [n, in]")
    if codes.numel() and int(codes.max()) >= _CODES:
        raise ValueError(f"a code is {int(codes.max())}, two bits hold up to 3")
