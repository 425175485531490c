// Products and whole experts, shared out over threads.
#pragma once
#include "matrix.h"

namespace moe {

// A matrix of either kind; the bias is float32 or null.
struct Weight {
  int32_t is_quantized;
  QuantizedMatrix quantized;
  FloatMatrix floats;
  const float* bias;

  int n_outputs() const { return is_quantized ? quantized.n_outputs : floats.n_outputs; }
  int n_inputs() const { return is_quantized ? quantized.n_inputs : floats.n_inputs; }
};

void set_threads(int n_threads);
// False where this processor lacks the instructions.
bool use_kernels(const char* name);
const char* kernels_in_use();

// out [tokens][outputs] = x [tokens][inputs] @ weight.T + bias
void linear(const Weight& weight, const float* x, int n_tokens, float* out);

// out [tokens][outputs of second] = act(x @ first.T + bias) @ second.T + bias
void expert(const Weight& first, const Gate& gate, const Weight& second, const float* x,
            int n_tokens, float* out);

}  // namespace moe
