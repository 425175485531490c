#include "engine.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

#include "thread_pool.h"

namespace moe {
namespace {

// Leaked on purpose: its threads may outlive static destructors at exit.
ThreadPool& pool() {
  static ThreadPool* const only = new ThreadPool;
  return *only;
}

#if defined(__x86_64__)
bool has(const Kernels* kernels) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (kernels == &kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
  if (kernels == &kAvx512) return avx512;
  if (kernels == &kAvx2) return avx2;
  return true;
}
const Kernels* const kBestFirst[] = {&kAvx512Vnni, &kAvx512, &kAvx2, &kScalar};
#else
bool has(const Kernels*) { return true; }
const Kernels* const kBestFirst[] = {&kScalar};
#endif

const Kernels* best() {
  return *std::find_if(std::begin(kBestFirst), std::end(kBestFirst), has);
}
const Kernels* in_use = best();

// One job at a time uses the scratch memory; it only grows.
std::mutex job;

template <class T>
class Scratch {
 public:
  T* of(size_t n) {
    if (n > size_) {
      memory_.reset();
      memory_.reset(new T[n]);
      size_ = n;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  size_t size_ = 0;
};

struct TokenScratch {
  Scratch<int8_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> sums, lane_sums;
  Scratch<uint8_t> tables;
  Scratch<float> values;
};
TokenScratch input_scratch, inner_scratch;
Scratch<float> product_scratch, inner_floats, input_floats;
thread_local Scratch<uint8_t> row_codes;
thread_local Scratch<float> row_sums, kept_factors;
thread_local Scratch<uint32_t> pair_sums;

// Largest numbers of tokens, by bits.
int lookup_tokens[3] = {0, 0, 0};

bool is_looked_up(const QuantizedMatrix& w, int n_tokens) {
  return w.bits <= 2 && n_tokens <= lookup_tokens[w.bits] && in_use->lookup->sum_rows &&
         w.group / kInputs * units_per_block(w.bits) <= kMaxWidenings;
}

QuantizedTokens room_for(TokenScratch& scratch, const QuantizedMatrix& w, int n_tokens) {
  QuantizedTokens x;
  x.padded = w.input_blocks() * kInputs;
  x.n_groups = w.n_groups();
  x.codes = scratch.codes.of(size_t(n_tokens) * x.padded);
  x.scales = scratch.scales.of(size_t(n_tokens) * x.n_groups);
  x.sums = scratch.sums.of(size_t(n_tokens) * x.n_groups);
  x.tables = is_looked_up(w, n_tokens)
                 ? scratch.tables.of(size_t(n_tokens) * x.padded * table_bytes_per_input(w.bits))
                 : nullptr;
  return x;
}

// Groups [first, last) of one token.
void quantize_groups(const QuantizedMatrix& w, const float* x, int token, int first, int last,
                     const QuantizedTokens& out) {
  in_use->quantize(x, w.n_inputs, w.group, token, first, last, out);
  const int blocks = w.group / kInputs;
  if (out.tables)
    in_use->lookup->sum_tables(out, w.bits, token, first * blocks,
                               std::min(w.input_blocks(), last * blocks));
}

// Tokens as one form of a matrix takes them.
struct Tokens {
  const float* floats;
  QuantizedTokens rounded;
  KeptTokens ordered;
};

KeptTokens room_for(TokenScratch& scratch, const KeptMatrix& w, int n_tokens) {
  KeptTokens x{};
  x.padded = w.padded();
  const size_t size = size_t(n_tokens) * x.padded;
  if (!w.with_integers) {
    x.values = scratch.values.of(size);
    return x;
  }
  x.codes = scratch.codes.of(size);
  x.scales = scratch.scales.of(size_t(n_tokens) * w.n_token_groups());
  x.sums = scratch.sums.of(size_t(n_tokens) * w.n_token_groups());
  x.lane_sums = scratch.lane_sums.of(size / 4);
  return x;
}

Tokens room_for(TokenScratch& scratch, const Weight& weight, const float* x, int n_tokens) {
  Tokens tokens{x, {}, {}};
  if (weight.form == Form::kQuantized)
    tokens.rounded = room_for(scratch, weight.quantized, n_tokens);
  if (weight.form == Form::kKept) tokens.ordered = room_for(scratch, weight.kept, n_tokens);
  return tokens;
}

// Inputs [first, last) of one token; but for the last input they end where groups do.
void prepare(const Weight& weight, const float* x, int token, int first, int last,
             const Tokens& out) {
  if (weight.form == Form::kQuantized) {
    const int group = weight.quantized.group;
    quantize_groups(weight.quantized, x, token, first / group, (last + group - 1) / group,
                    out.rounded);
  } else if (weight.form == Form::kKept) {
    in_use->order_tokens(weight.kept, x, token, first, last, out.ordered);
  }
}

void add_bias(const float* bias, int first, int last, int n_tokens, float* out, ptrdiff_t stride) {
  if (!bias) return;
  for (int t = 0; t < n_tokens; ++t)
    for (int i = first; i < last; ++i) out[t * stride + i] += bias[i];
}

// Sums of channels that are computed apart, then added in their order.
constexpr int kChannelParts = 16;

// Rows that make a chunk: so many bytes at least, long beside the cost of taking one; and no more
// chunks than balance needs, since a thread that reads on is ahead of one that starts anew.
constexpr size_t kChunkBytes = 64 * 1024;
constexpr int kChunksPerThread = 12;

int rows_per_chunk(int n_rows, size_t row_bytes) {
  const int for_bytes = int(kChunkBytes / std::max<size_t>(1, row_bytes));
  return std::max({1, for_bytes, n_rows / (kChunksPerThread * pool().n_threads())});
}

void multiply_kept(const Weight& weight, const KeptTokens& x, int n_tokens, float* out) {
  const KeptMatrix& w = weight.kept;
  const int rows = (rows_per_chunk(w.n_outputs, w.row_bytes()) + kKeptRows - 1) / kKeptRows * kKeptRows;
  pool().each((w.n_outputs + rows - 1) / rows, [&](int chunk) {
    const int first = chunk * rows, last = std::min(w.n_outputs, first + rows);
    float* const scratch = kept_factors.of(w.scratch());
    if (w.with_integers)
      in_use->kept_integer_rows(w, first, last, x, n_tokens, out, w.n_outputs, scratch);
    else
      in_use->kept_rows(w, first, last, &x, n_tokens, out, w.n_outputs, scratch);
    add_bias(weight.bias, first, last, n_tokens, out, w.n_outputs);
  });
}

void multiply(const Weight& weight, const Tokens& tokens, int n_tokens, float* out) {
  const int n_outputs = weight.n_outputs;
  const ptrdiff_t stride = n_outputs;
  const float* const x = tokens.floats;
  if (weight.form == Form::kKept) return multiply_kept(weight, tokens.ordered, n_tokens, out);
  if (weight.form == Form::kFloats) {
    const FloatMatrix& w = weight.floats;
    const size_t row = size_t(w.n_inputs) * (w.kind == kFloat32 ? 4 : 2);
    const int rows = (rows_per_chunk(n_outputs, row) + 3) / 4 * 4;  // four are computed together
    pool().each((n_outputs + rows - 1) / rows, [&](int chunk) {
      const int first = chunk * rows, last = std::min(n_outputs, first + rows);
      in_use->float_rows(w, first, last, x, n_tokens, out, stride);
      add_bias(weight.bias, first, last, n_tokens, out, stride);
    });
    return;
  }
  const QuantizedMatrix& w = weight.quantized;
  const QuantizedTokens& codes = tokens.rounded;
  const size_t block = size_t(codes.padded) * kRows * w.bits / 8;
  const int n_blocks = w.row_blocks();
  const int blocks = (rows_per_chunk(n_blocks, block) + 1) / 2 * 2;  // two are looked up together
  pool().each((n_blocks + blocks - 1) / blocks, [&](int chunk) {
    const RowScratch scratch{row_codes.of(size_t(kRows) * std::max(kExpandedInputs, w.group)),
                             row_sums.of(size_t(n_tokens) * kRows)};
    const int first = chunk * blocks, last = std::min(n_blocks, first + blocks);
    int b = first;
    if (codes.tables)
      for (; b + 2 <= last; b += 2)
        in_use->lookup->sum_rows(w, b, codes, n_tokens, out, stride);
    for (; b < last; ++b) in_use->quantized_rows(w, b, codes, n_tokens, out, stride, scratch);
    add_bias(weight.bias, first * kRows, std::min(n_outputs, last * kRows), n_tokens, out, stride);
  });
}

void product(const Weight& weight, TokenScratch& scratch, const float* x, int n_tokens,
             float* out) {
  const Tokens tokens = room_for(scratch, weight, x, n_tokens);
  if (weight.form != Form::kFloats)
    pool().each(n_tokens, [&](int t) {
      prepare(weight, x + size_t(t) * weight.n_inputs, t, 0, weight.n_inputs, tokens);
    });
  multiply(weight, tokens, n_tokens, out);
}

// The gate, and the second matrix's form of its input, part by part.
void activate(const Gate& gate, const Weight& second, const float* first_product, int n_product,
              int n_tokens, float* inner, const Tokens& tokens) {
  const int n_inner = second.n_inputs;
  const int group = second.form == Form::kQuantized ? second.quantized.group : 128;
  const int per_chunk = std::max(1, 1024 / group) * group;
  const int chunks = (n_inner + per_chunk - 1) / per_chunk;
  pool().each(n_tokens * chunks, [&](int at) {
    const int t = at / chunks, first = at % chunks * per_chunk;
    const int last = std::min(n_inner, first + per_chunk);
    float* const row = inner + size_t(t) * n_inner;
    in_use->activate(gate, first_product + size_t(t) * n_product, n_inner, first, last, row);
    prepare(second, row, t, first, last, tokens);
  });
}

}  // namespace

void set_threads(int n_threads) {
  std::lock_guard<std::mutex> lock(job);
  pool().resize(n_threads);
}

bool use_kernels(const char* name) {
  std::lock_guard<std::mutex> lock(job);
  for (const Kernels* kernels : kBestFirst) {
    if (!std::strcmp(name, kernels->name) && has(kernels)) {
      in_use = kernels;
      return true;
    }
  }
  return false;
}

const char* kernels_in_use() { return in_use->name; }

bool use_lookup(int bits, int max_tokens) {
  std::lock_guard<std::mutex> lock(job);
  if (bits < 1 || bits > 2 || !in_use->lookup->sum_rows) return false;
  lookup_tokens[bits] = max_tokens;
  return true;
}

void pair_product(const uint8_t* codes, int n_outputs, int n_quads, const uint8_t* tokens,
                  int n_tokens, const PairTables& tables, int32_t* out) {
  std::lock_guard<std::mutex> lock(job);
  // A byte of a token that is no offset of a table ends in the padding.
  uint8_t planes[256 * kMaxDigits + 16] = {};
  std::memcpy(planes, tables.planes, 256 * size_t(tables.n_digits));
  const int n_tiles = (n_outputs + kPairRows - 1) / kPairRows;
  const int n_parts = (n_tokens + kPairTokens - 1) / kPairTokens;
  pool().each(n_tiles * n_parts, [&](int at) {
    const int tile = at / n_parts, token = at % n_parts * kPairTokens;
    const int n = std::min(kPairTokens, n_tokens - token);
    uint32_t* const sums = pair_sums.of(size_t(kPairTokens) * kPairRows);
    std::fill_n(sums, size_t(n) * kPairRows, uint32_t(tables.base));
    for (int q = 0; q < n_quads; q += kPairQuads)
      for (int d = 0; d < tables.n_digits; ++d)
        in_use->lookup->pair_part(codes + (size_t(tile) * n_quads + q) * kPairRows,
                                  tokens + (size_t(token) * n_quads + q) * 2, 2 * ptrdiff_t(n_quads),
                                  n, std::min(kPairQuads, n_quads - q),
                                  tables.quads_per_widening[d], planes + 256 * d,
                                  d * tables.digit_bits, sums);
    const int first = tile * kPairRows, rows = std::min(kPairRows, n_outputs - first);
    for (int t = 0; t < n; ++t)
      std::memcpy(out + size_t(token + t) * n_outputs + first, sums + size_t(t) * kPairRows,
                  rows * sizeof(int32_t));
  });
}

void linear(const Weight& weight, const float* x, int n_tokens, float* out) {
  std::lock_guard<std::mutex> lock(job);
  product(weight, input_scratch, x, n_tokens, out);
}

void decode(const KeptMatrix& w, int first, int last, float* out) {
  std::lock_guard<std::mutex> lock(job);
  const int rows = rows_per_chunk(last - first, w.row_bytes());
  pool().each((last - first + rows - 1) / rows, [&](int chunk) {
    const int row = first + chunk * rows;
    in_use->kept_rows(w, row, std::min(last, row + rows), nullptr, 0,
                      out + size_t(row - first) * w.n_inputs, 0, kept_factors.of(w.scratch()));
  });
}

void expert(const Weight& first, const Gate& gate, const Weight& second, const float* x,
            int n_tokens, float* out) {
  std::lock_guard<std::mutex> lock(job);
  const int n_product = first.n_outputs;
  float* const first_product = product_scratch.of(size_t(n_tokens) * n_product);
  product(first, input_scratch, x, n_tokens, first_product);
  float* const inner = inner_floats.of(size_t(n_tokens) * second.n_inputs);
  const Tokens tokens = room_for(inner_scratch, second, inner, n_tokens);
  activate(gate, second, first_product, n_product, n_tokens, inner, tokens);
  multiply(second, tokens, n_tokens, out);
}

void channel_expert(const ChannelJob& given, float* out) {
  std::lock_guard<std::mutex> lock(job);
  ChannelJob part = given;
  part.gate.interleaved = 0;
  const ChannelMatrix& w = part.weight;
  // Tokens, then a sum for each part of all channels, filled up to whole blocks. The parts are the
  // same whatever is wanted, so that what is left out changes no other sum.
  const size_t size = size_t(part.n_tokens) * w.padded();
  float* const inputs = input_floats.of((1 + kChannelParts) * size);
  float* const sums = inputs + size;
  std::fill_n(inputs, (1 + kChannelParts) * size, 0.0f);
  for (int t = 0; t < part.n_tokens; ++t)
    std::memcpy(inputs + size_t(t) * w.padded(), given.x + size_t(t) * w.n_hidden,
                w.n_hidden * sizeof(float));
  part.x = inputs;
  const auto begin_of = [&](int p) {
    const int channel = int(int64_t(w.n_channels) * p / kChannelParts);
    if (!w.wanted) return channel;
    return int(std::lower_bound(w.wanted, w.wanted + w.n_wanted, channel) - w.wanted);
  };
  pool().each(kChannelParts, [&](int p) {
    in_use->add_channels(part, begin_of(p), begin_of(p + 1), sums + p * size);
  });
  for (int p = 1; p < kChannelParts; ++p)
    for (size_t i = 0; i < size; ++i) sums[i] += sums[p * size + i];
  for (int t = 0; t < part.n_tokens; ++t)
    std::memcpy(out + size_t(t) * w.n_hidden, sums + size_t(t) * w.padded(),
                w.n_hidden * sizeof(float));
}

void largest_of_groups(const FloatMatrix& w, int group, float* out) {
  std::lock_guard<std::mutex> lock(job);
  const int rows = rows_per_chunk(w.n_outputs, size_t(w.n_inputs) * (w.kind == kFloat32 ? 4 : 2));
  pool().each((w.n_outputs + rows - 1) / rows, [&](int chunk) {
    const int first = chunk * rows;
    in_use->largest_of_groups(w, group, first, std::min(w.n_outputs, first + rows), out);
  });
}

void round_to_nearest(const FloatMatrix& w, const float* scales, int bits, int group,
                      uint8_t* const* planes) {
  std::lock_guard<std::mutex> lock(job);
  pool().each((w.n_outputs + kRows - 1) / kRows, [&](int block) {
    in_use->round_block(w, scales, bits, group, block, planes);
  });
}

}  // namespace moe
