// Products and whole experts, shared out over threads.
#pragma once
#include "lookup.h"

namespace moe {

enum class Form : int32_t { kFloats = 0, kQuantized = 1, kKept = 2 };

// A matrix of one of the forms; the bias is float32 or null.
struct Weight {
  Form form;
  int32_t n_outputs, n_inputs;
  QuantizedMatrix quantized;
  FloatMatrix floats;
  KeptMatrix kept;
  const float* bias;
};

void set_threads(int n_threads);
// False where this processor lacks the instructions.
bool use_kernels(const char* name);
const char* kernels_in_use();
// Look up the products of up to so many tokens with weights of 1 or 2 bits, 0: none; results stay
// the same to the last bit. False where this processor has no such kernel.
bool use_lookup(int bits, int max_tokens);

// out [tokens][outputs] = x [tokens][inputs] @ weight.T + bias
void linear(const Weight& weight, const float* x, int n_tokens, float* out);

// out [last - first][inputs]: rows of kept codes as floats.
void decode(const KeptMatrix& w, int first, int last, float* out);

// out [tokens][outputs of second] = act(x @ first.T + bias) @ second.T + bias
void expert(const Weight& first, const Gate& gate, const Weight& second, const float* x,
            int n_tokens, float* out);

// out [tokens][hidden] of the wanted channels of an expert; the x of `job` is [tokens][hidden].
void channel_expert(const ChannelJob& job, float* out);

// The number of largest size in every group of a matrix's rows, [outputs][groups], see Kernels.
void largest_of_groups(const FloatMatrix& w, int group, float* out);
// Its codes on grids of these scales, [outputs][groups], into planes.
void round_to_nearest(const FloatMatrix& w, const float* scales, int bits, int group,
                      uint8_t* const* planes);

// out [tokens][outputs] of the two-bit codes of lookup.h; codes [tiles][quads][128], tokens
// [tokens][2 quads].
void pair_product(const uint8_t* codes, int n_outputs, int n_quads, const uint8_t* tokens,
                  int n_tokens, const PairTables& tables, int32_t* out);

}  // namespace moe
