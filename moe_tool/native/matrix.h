// What the kernels work on. A quantized matrix is stored in tiles of 16 outputs and 32 inputs, so
// that the 16 lanes of an accumulator are 16 outputs and no sum runs across lanes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moe {

constexpr int kRows = 16;    // outputs of a tile
constexpr int kInputs = 32;  // inputs of a tile
constexpr int kMaxPlanes = 4;

// Codes of 1 to 7 bits lie in planes of two bits, most significant first, the last of one bit where
// the width is odd; 8 bits are one plane. A plane is [row blocks][input blocks][bytes of a tile]:
//   two bits: 128 bytes; byte 64 h + 4 r + i, bits 2k and 2k + 1: output r, input 16 h + 4 k + i
//   one bit:   64 bytes; byte 4 r + i, bit k:                     output r, input 4 k + i
//   eight:    512 bytes; byte 64 k + 4 r + i:                     output r, input 4 k + i
struct QuantizedMatrix {
  const uint8_t* planes[kMaxPlanes];
  const uint16_t* scales;  // float16 [row blocks][groups][16]
  const uint16_t* zeros;   // float16, as scales, in units of codes; null: a weight is
  int32_t shift, offset;   // (2^shift code - offset) scale
  int32_t n_outputs, n_inputs, bits, group;

  int row_blocks() const { return (n_outputs + kRows - 1) / kRows; }
  int input_blocks() const { return (n_inputs + kInputs - 1) / kInputs; }
  int n_groups() const { return (n_inputs + group - 1) / group; }
};

enum FloatKind : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct FloatMatrix {
  const void* values;  // [n_outputs][n_inputs]
  int32_t n_outputs, n_inputs, kind;
};

// Codes, scales and zeros as quantization/kept_codes.py has them; a group is [rows][columns].
enum CodeKind : int32_t { kE2m1 = 0, kInt4 = 1, kNf4 = 2, kE4m3 = 3, kInt8 = 4 };
// Beside those of FloatKind: bytes that are scales, or zeros.
enum ByteKind : int32_t { kE8m0Scale = 3, kE4m3Scale = 4, kByteZero = 5 };
constexpr int scale_bytes(int kind) { return kind == kFloat32 ? 4 : (kind <= kFloat16 ? 2 : 1); }
constexpr int kKeptRows = 4;  // rows that are computed together

struct KeptMatrix {
  const uint8_t* codes;       // [n_outputs][n_inputs bits / 8]
  const void *scales, *zeros;  // [row groups][groups]; zeros: null, bytes or float32
  const float* global_scale;  // [n_outputs] or null
  const float* table;         // numbers of 16 codes; of 4 bits
  int32_t n_outputs, n_inputs, code_kind, scale_kind, rows, columns;
  int32_t zero_is_float, is_divisor;
  int32_t with_integers;  // whether tokens are rounded to int8

  int bits() const { return code_kind <= kNf4 ? 4 : 8; }
  ptrdiff_t row_bytes() const { return ptrdiff_t(n_inputs) * bits() / 8; }
  // Whether codes of rows from `row` on fill so many bytes: what is read behind a row meets inputs of 0.
  bool has_behind(int row, int n_bytes) const { return row_bytes() * (n_outputs - row) >= n_bytes; }
  int n_groups() const { return (n_inputs + columns - 1) / columns; }
  int n_blocks() const { return (n_inputs + kInputs - 1) / kInputs; }
  int padded() const {
    const int part = bits() == 4 ? 128 : (with_integers ? 64 : kInputs);
    return (n_inputs + part - 1) / part * part;
  }
  // Inputs of a token that share a scale.
  int token_group() const { return columns == 16 || columns == 32 || columns == 64 ? columns : 128; }
  int n_token_groups() const { return (n_inputs + token_group() - 1) / token_group(); }
  // Numbers of scratch for the scales of a row: those of the matrix or of a token.
  ptrdiff_t factor_row() const {
    return (n_groups() > n_token_groups() ? n_groups() : n_token_groups()) + 32;
  }
  size_t scratch() const { return kKeptRows * (2 * size_t(factor_row()) + padded()); }
};

// Tokens in the order of kept.inc, as floats or, where `values` is null, as int8.
struct KeptTokens {
  float* values;      // [tokens][padded]
  int8_t* codes;  // [tokens][padded]
  float* scales;  // [tokens][groups]
  int32_t* sums;  // [tokens][groups]
  // [tokens][parts][16]: sums of the codes that meet in a lane, times what the weight makes of them
  int32_t* lane_sums;
  int32_t padded;
};

// Where input i lies in the order of codes of 4 bits: of 32 inputs first the even ones.
template <bool NIBBLES>
constexpr int place_of(int i) {
  return NIBBLES ? i / kInputs * kInputs + i % 2 * (kInputs / 2) + i % kInputs / 2 : i;
}

// Tokens as int8 with one scale per group of inputs, each row padded with zeros to whole tiles.
struct QuantizedTokens {
  int8_t* codes;   // [tokens][padded]
  float* scales;   // [tokens][groups]
  int32_t* sums;   // [tokens][groups]: sum of the codes of a group
  int32_t padded, n_groups;
  uint8_t* tables;  // of sums, see lookup.h; null: not looked up
};

// An expert's channels as quantization/channels.py packs them, and which of them are wanted.
struct ChannelMatrix {
  const uint8_t* chunks;
  const int32_t* wanted;  // ascending; null: all
  int32_t n_channels, n_wanted, n_hidden, bits, group;

  int padded() const { return (n_hidden + kInputs - 1) / kInputs * kInputs; }
  int n_groups() const { return (n_hidden + group - 1) / group; }
  ptrdiff_t code_bytes() const { return ptrdiff_t(padded()) * bits / 8; }
  ptrdiff_t half() const { return code_bytes() + 2 * ptrdiff_t(n_groups()); }
  const uint8_t* chunk(int at) const { return chunks + 2 * half() * (wanted ? wanted[at] : at); }
};

enum Activation : int32_t {
  kSilu = 0, kGeluTanh = 1, kGeluErf = 2, kRelu = 3, kReluSquared = 4, kClampedSwiglu = 5,
};

// How the first product becomes the input of the second.
struct Gate {
  int32_t activation;
  int32_t gated;        // 0: act(up); 1: act(gate) * up
  int32_t interleaved;  // gate and up alternate instead of gate first, then up
  float alpha, limit;   // of kClampedSwiglu: gate * sigmoid(alpha gate) * (up + 1), both clamped
};

// `chosen` [tokens][wanted] is what the matrix that chooses channels makes of the tokens, the gate or
// the up projection; the bias [wanted] is the other one's, or null; x is [tokens][padded].
struct ChannelJob {
  ChannelMatrix weight;
  Gate gate;
  bool chosen_is_gate;
  const float *chosen, *bias, *x;
  int n_tokens;
};

// Inputs of a row block that are expanded to bytes at a time, or one group where that is longer.
constexpr int kExpandedInputs = 1024;

// What one thread needs for a row block.
struct RowScratch {
  uint8_t* codes;  // [kRows * max(kExpandedInputs, group)]
  float* sums;     // [tokens][kRows]
};

// One implementation per instruction set; every function handles part of a job and any two threads
// may handle different parts at once.
struct Lookup;
struct Kernels {
  const char* name;
  // Quantize groups [first, last) of one token's inputs; the padding belongs to the last group.
  void (*quantize)(const float* x, int n_inputs, int group, int token, int first, int last,
                   const QuantizedTokens& out);
  // out[token * stride + output] for one block of 16 outputs and all tokens.
  void (*quantized_rows)(const QuantizedMatrix& w, int row_block, const QuantizedTokens& x,
                         int n_tokens, float* out, ptrdiff_t stride, const RowScratch& scratch);
  // The same for outputs [first, last) of a matrix of floats; x is [tokens][n_inputs].
  void (*float_rows)(const FloatMatrix& w, int first, int last, const float* x, int n_tokens,
                     float* out, ptrdiff_t stride);
  // inner[first, last) of one token from its first product.
  void (*activate)(const Gate& gate, const float* first_product, int n_inner, int first, int last,
                   float* inner);
  // The number of largest size in every group of rows [first, last), [row][groups], as it is; NaN
  // where one is not finite. Groups have up to 128 inputs.
  void (*largest_of_groups)(const FloatMatrix& w, int group, int first, int last, float* out);
  // Codes of 2 to 8 bits of one block of 16 outputs into its tiles; scales [row][groups].
  void (*round_block)(const FloatMatrix& w, const float* scales, int bits, int group, int row_block,
                      uint8_t* const* planes);
  // out [tokens][padded] += what the wanted channels [first, last) give.
  void (*add_channels)(const ChannelJob& job, int first, int last, float* out);
  // out[token * stride + output] for outputs [first, last); without tokens their weights, in order.
  void (*kept_rows)(const KeptMatrix& w, int first, int last, const KeptTokens* x, int n_tokens,
                    float* out, ptrdiff_t stride, float* scratch);
  void (*kept_integer_rows)(const KeptMatrix& w, int first, int last, const KeptTokens& x,
                            int n_tokens, float* out, ptrdiff_t stride, float* scratch);
  // Inputs [first, last) of one token, rounded where the products are those of integers.
  void (*order_tokens)(const KeptMatrix& w, const float* x, int token, int first, int last,
                       const KeptTokens& out);
  const Lookup* lookup;
};

extern const Kernels kScalar, kAvx2, kAvx512, kAvx512Vnni;

}  // namespace moe
