// Products by table lookup: one byte shuffle reads 32 entries of a table of 16. Exact.
#pragma once
#include "matrix.h"

namespace moe {

// --- two bits by two bits: codes of either side stand for whole numbers of a code book ---------
//
// Four codes of weights, two nibbles, are a byte: codes [tiles][quads][128], byte r: output r of
// the tile; low nibble inputs 0 and 1 of the quad (1 in the upper bits), high nibble 2 and 3.
// Two codes of a token are a byte: [tokens][2 quads], the first in bits 4 and 5, the second in 6
// and 7, which makes it the offset of its table of 16.
constexpr int kPairRows = 128;   // outputs of a tile
constexpr int kPairQuads = 64;   // that meet all tokens at a time: 16 KiB as bytes
constexpr int kPairTokens = 32;  // that meet them
constexpr int kMaxDigits = 3;

// Sums of two products, less the smallest of them, in digits that are small enough for at least two
// to be added in a byte: planes [digits][16 codes of tokens][16 codes of weights].
struct PairTables {
  const uint8_t* planes;
  int32_t n_digits, digit_bits;
  int32_t quads_per_widening[kMaxDigits];  // 2 * quads * largest entry <= 255
  int32_t base;                            // what is missing from a whole sum
};

// --- one or two bits by eight: for four inputs at one bit, or two at two, the 16 sums that their
// weights can make of them. The nibbles are those of the stored planes.
//
// Tables [tokens][padded inputs / 4 or / 2][32]: 16 entries' low five bits, then the upper five.
constexpr int kSumOffset = 4 * 127;  // added to every sum
constexpr int kDigitBits = 5;
constexpr int kMaxWidenings = 8;  // of 8 lookups, into 16 bits: 8 * 8 * (31 + 32 * 31) fits

// Lookups of 64 bytes of a plane, and the units that 32 inputs are.
constexpr int kUnitLookups = 8;
constexpr int units_per_block(int bits) { return bits; }
constexpr int table_bytes_per_input(int bits) { return 8 * bits; }

struct Lookup {
  // sums[token][128] += the sums of a tile's quads, times 2 ** shift.
  void (*pair_part)(const uint8_t* codes, const uint8_t* tokens, ptrdiff_t token_stride,
                    int n_tokens, int n_quads, int quads_per_widening, const uint8_t* table,
                    int shift, uint32_t* sums);
  // Tables of one token's input blocks [first, last); null: use Kernels::quantized_rows.
  void (*sum_tables)(const QuantizedTokens& x, int bits, int token, int first, int last);
  // As Kernels::quantized_rows and to the last bit the same, for this block of outputs and the
  // next. Widths 1 and 2, groups of up to kMaxWidenings units.
  void (*sum_rows)(const QuantizedMatrix& w, int row_block, const QuantizedTokens& x, int n_tokens,
                   float* out, ptrdiff_t stride);
};

extern const Lookup kLookupScalar, kLookupAvx2;

}  // namespace moe
