// Products of random shapes over buffers of exactly the promised size, for AddressSanitizer and
// UndefinedBehaviorSanitizer (make fuzz): nothing is read or written beyond them, every
// implementation returns what the scalar one does, and what is looked up is what is multiplied.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "engine.h"

namespace {

std::mt19937 draw(20);
int from_to(int low, int high) { return std::uniform_int_distribution<int>(low, high)(draw); }

struct Matrix {
  std::vector<std::vector<uint8_t>> planes;
  std::vector<uint16_t> scales, zeros;
  std::vector<uint8_t> values;
  std::vector<float> bias, factors;
  moe::Weight weight{};
};

// Positive float16 of moderate size.
uint16_t any_half() { return uint16_t(from_to(10, 17) << 10 | from_to(0, 1023)); }

void quantized(Matrix& m, int n_out, int n_in, int bits, int group) {
  moe::QuantizedMatrix& q = m.weight.quantized;
  m.weight.form = moe::Form::kQuantized;
  q.shift = from_to(0, 3), q.offset = from_to(0, 128);
  q.n_outputs = n_out, q.n_inputs = n_in, q.bits = bits, q.group = group;
  const int n_planes = bits == 8 ? 1 : (bits + 1) / 2;
  for (int p = 0; p < n_planes; ++p) {
    const int width = bits == 8 ? 8 : (bits - 2 * p >= 2 ? 2 : 1);
    m.planes.emplace_back(size_t(q.row_blocks()) * q.input_blocks() * 64 * width);
    for (uint8_t& byte : m.planes.back()) byte = uint8_t(from_to(0, 255));
  }
  for (int p = 0; p < n_planes; ++p) q.planes[p] = m.planes[p].data();
  m.scales.resize(size_t(q.row_blocks()) * q.n_groups() * 16);
  for (uint16_t& scale : m.scales) scale = any_half();
  q.scales = m.scales.data();
  if (from_to(0, 1)) {
    m.zeros.resize(m.scales.size());
    for (uint16_t& zero : m.zeros) zero = any_half();
    q.zeros = m.zeros.data();
  }
}

void floats(Matrix& m, int n_out, int n_in) {
  const int kind = from_to(0, 2);
  m.values.resize(size_t(n_out) * n_in * (kind == moe::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < size_t(n_out) * n_in; ++i) {
    const float value = float(from_to(-100, 100)) / 64;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t brain = uint16_t(bits >> 16), half = any_half();
    if (kind == moe::kFloat32) std::memcpy(&m.values[4 * i], &value, 4);
    if (kind == moe::kBFloat16) std::memcpy(&m.values[2 * i], &brain, 2);
    if (kind == moe::kFloat16) std::memcpy(&m.values[2 * i], &half, 2);
  }
  m.weight.floats = {m.values.data(), n_out, n_in, kind};
}

// Kept codes; of bytes and scales that are fp8 none is NaN.
void kept(Matrix& m, int n_out, int n_in) {
  static const float table[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6};
  const int columns[] = {16, 32, 64, 128, 256, n_in}, rows[] = {1, 3, 128};
  moe::KeptMatrix& k = m.weight.kept;
  m.weight.form = moe::Form::kKept;
  k.n_outputs = n_out, k.n_inputs = n_in, k.table = table;
  k.code_kind = from_to(0, 4), k.scale_kind = from_to(0, 4);
  if (k.bits() == 4 && n_in % 2) k.code_kind = moe::kE4m3;
  k.rows = rows[from_to(0, 2)], k.columns = columns[from_to(0, 5)];
  const bool is_integer = k.code_kind == moe::kInt4 || k.code_kind == moe::kInt8;
  k.with_integers = (is_integer || k.code_kind == moe::kE2m1) && from_to(0, 1);
  m.values.resize(size_t(n_out) * k.row_bytes());
  for (uint8_t& byte : m.values) byte = uint8_t(from_to(0, 126));
  k.codes = m.values.data();
  const size_t n = size_t((n_out + k.rows - 1) / k.rows) * k.n_groups();
  m.planes.resize(2);
  m.planes[0].resize(n * moe::scale_bytes(k.scale_kind));
  for (size_t i = 0; i < n; ++i) {
    const float value = float(from_to(1, 100)) / 64;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t brain = uint16_t(bits >> 16), half = any_half();
    uint8_t* const at = m.planes[0].data() + i * moe::scale_bytes(k.scale_kind);
    if (k.scale_kind == moe::kFloat32) std::memcpy(at, &value, 4);
    else if (k.scale_kind == moe::kBFloat16) std::memcpy(at, &brain, 2);
    else if (k.scale_kind == moe::kFloat16) std::memcpy(at, &half, 2);
    else *at = uint8_t(k.scale_kind == moe::kE8m0Scale ? from_to(120, 130) : from_to(30, 70));
  }
  k.scales = m.planes[0].data();
  if (is_integer && from_to(0, 1)) {
    k.zero_is_float = from_to(0, 1);
    m.planes[1].assign(n * (k.zero_is_float ? 4 : 1), 60);
    k.zeros = m.planes[1].data();
  }
  if (from_to(0, 1)) {
    m.factors.assign(n_out, 1.5f);
    k.global_scale = m.factors.data(), k.is_divisor = from_to(0, 1);
  }
}

void fill(Matrix& m, int n_out, int n_in) {
  m.weight.n_outputs = n_out, m.weight.n_inputs = n_in;
  const int groups[] = {32, 64, 128};
  const int form = from_to(0, 4);
  if (form < 2)
    kept(m, n_out, n_in);
  else if (form < 4)
    quantized(m, n_out, n_in, from_to(1, 8), groups[from_to(0, 2)]);
  else
    floats(m, n_out, n_in);
  if (from_to(0, 1)) {
    m.bias.assign(n_out, 0.5f);
    m.weight.bias = m.bias.data();
  }
}

bool agree(const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
  double largest = 1e-20, off = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return false;
    if (!std::isfinite(a[i])) continue;
    largest = std::max(largest, std::fabs(double(a[i])));
    off = std::max(off, std::fabs(double(a[i]) - double(b[i])));
  }
  return off <= tolerance * largest;
}

// Two-bit codes of both sides, against sums of products; entries are any that the tables may hold.
bool pairs_agree(const char* name) {
  const bool is_long = !from_to(0, 9);  // beyond what meets all tokens at a time
  const int n_out = from_to(1, is_long ? 20 : 200), n_in = 4 * from_to(1, is_long ? 300 : 20);
  const int n_tokens = from_to(1, is_long ? 5 : 40), n_quads = n_in / 4;
  const int n_digits = from_to(1, 3), bits = 6;
  const int n_tiles = (n_out + moe::kPairRows - 1) / moe::kPairRows;
  std::vector<uint8_t> codes(size_t(n_tiles) * n_quads * moe::kPairRows);
  std::vector<uint8_t> tokens(size_t(n_tokens) * n_quads * 2), planes(256 * n_digits);
  for (uint8_t& byte : codes) byte = uint8_t(from_to(0, 255));
  for (uint8_t& byte : tokens) byte = uint8_t(from_to(0, 15) << 4);
  moe::PairTables tables{planes.data(), n_digits, bits, {}, from_to(-1000, 1000)};
  for (int d = 0; d < n_digits; ++d) {
    const int largest = from_to(1, (1 << bits) - 1);
    for (int i = 0; i < 256; ++i) planes[256 * d + i] = uint8_t(from_to(0, 3) ? largest : 0);
    tables.quads_per_widening[d] = 255 / (2 * largest);
  }
  std::vector<int32_t> out(size_t(n_tokens) * n_out);
  moe::pair_product(codes.data(), n_out, n_quads, tokens.data(), n_tokens, tables, out.data());
  for (int t = 0; t < n_tokens; ++t)
    for (int r = 0; r < n_out; ++r) {
      int64_t sum = tables.base;
      for (int q = 0; q < n_quads; ++q) {
        const uint8_t byte = codes[(size_t(r / 128) * n_quads + q) * 128 + r % 128];
        for (int h = 0; h < 2; ++h)
          for (int d = 0; d < n_digits; ++d)
            sum += int64_t(planes[256 * d + tokens[(size_t(t) * n_quads + q) * 2 + h] +
                                  (h ? byte >> 4 : byte & 15)]) << (d * bits);
      }
      if (out[size_t(t) * n_out + r] != int32_t(sum)) {
        std::printf("%s: pairs differ, %d x %d, %d tokens\n", name, n_out, n_in, n_tokens);
        return false;
      }
    }
  return true;
}

// Wanted channels over a buffer that has room for these alone, beside one channel after the other.
bool channels_agree(const char* name) {
  const int n_hidden = from_to(1, 300), n_channels = from_to(1, 50), n_tokens = from_to(1, 6);
  moe::ChannelJob job{};
  moe::ChannelMatrix& w = job.weight;
  w = {nullptr, nullptr, n_channels, 0, n_hidden, from_to(0, 1) ? 4 : 8, 32 << from_to(0, 2)};
  std::vector<int32_t> wanted;
  for (int c = 0; c < n_channels; ++c)
    if (from_to(0, 1)) wanted.push_back(c);
  if (wanted.empty()) return true;
  w.n_wanted = int(wanted.size());
  std::vector<uint8_t> chunks(2 * w.half() * (wanted.back() + 1));  // what follows is not there
  for (uint8_t& byte : chunks) byte = uint8_t(from_to(0, 60));
  w.chunks = chunks.data(), w.wanted = wanted.data();
  std::vector<float> chosen(size_t(n_tokens) * wanted.size()), bias(wanted.size(), 0.25f);
  std::vector<float> x(size_t(n_tokens) * n_hidden), out(x.size()), sum(x.size());
  for (float& value : chosen) value = float(from_to(-300, 300)) / 100;
  for (float& value : x) value = float(from_to(-300, 300)) / 100;
  job.gate = {from_to(0, 5), 1, 0, 1.7f, 7.0f};
  job.chosen_is_gate = from_to(0, 1);
  job.chosen = chosen.data(), job.x = x.data(), job.n_tokens = n_tokens;
  job.bias = from_to(0, 1) ? bias.data() : nullptr;
  moe::channel_expert(job, out.data());
  std::vector<float> one(x.size()), value(n_tokens);
  for (size_t c = 0; c < wanted.size(); ++c) {
    moe::ChannelJob alone = job;
    for (int t = 0; t < n_tokens; ++t) value[t] = chosen[t * wanted.size() + c];
    alone.weight.n_wanted = 1, alone.weight.wanted = &wanted[c], alone.chosen = value.data();
    moe::channel_expert(alone, one.data());
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += one[i];
  }
  if (agree(sum, out, 1e-4)) return true;
  std::printf("%s: channels differ, %d of width %d\n", name, n_channels, n_hidden);
  return false;
}

// Codes of floats: each the nearest to its number that the grid has.
bool rounding_is_nearest(const char* name) {
  const int n_out = from_to(1, 60), n_in = from_to(1, 300), bits = from_to(2, 8);
  const int group = 32 << from_to(0, 2), n_groups = (n_in + group - 1) / group;
  std::vector<float> values(size_t(n_out) * n_in), scales(size_t(n_out) * n_groups);
  for (float& value : values) value = float(from_to(-1000, 1000)) / 64;
  const moe::FloatMatrix w{values.data(), n_out, n_in, moe::kFloat32};
  moe::largest_of_groups(w, group, scales.data());
  for (float& scale : scales) scale /= float(-(1 << (bits - 1)));
  std::vector<std::vector<uint8_t>> planes;
  uint8_t* at[moe::kMaxPlanes] = {};
  const size_t tiles = size_t((n_out + 15) / 16) * ((n_in + 31) / 32);
  for (int left = bits; left > 0;) {
    const int width = bits == 8 ? 8 : (left >= 2 ? 2 : 1);
    left -= width;
    planes.emplace_back(tiles * 64 * width);
    at[planes.size() - 1] = planes.back().data();
  }
  moe::round_to_nearest(w, scales.data(), bits, group, at);
  for (int i = 0; i < n_out * n_in; ++i) {
    const int row = i / n_in, in = i % n_in, r = row % 16, c = in % 32;
    const size_t tile = size_t(row / 16) * ((n_in + 31) / 32) + in / 32;
    int code = 0;
    for (size_t p = 0; p < planes.size(); ++p) {
      const int width = bits == 8 ? 8 : (int(p) * 2 + 2 <= bits ? 2 : 1), per_byte = 8 / width;
      const uint8_t byte = planes[p][tile * 64 * width + 64 * (c / 4 / per_byte) + 4 * r + c % 4];
      code = code << width | (byte >> width * (c / 4 % per_byte) & ((1 << width) - 1));
    }
    const float scale = scales[size_t(row) * n_groups + in / group];
    const float off = values[i] - float(code - (1 << (bits - 1))) * scale;
    const bool is_cut = code == (1 << bits) - 1 && std::fabs(off) <= std::fabs(scale) * 1.001f;
    if (!is_cut && std::fabs(off) > std::fabs(scale) * 0.501f) {
      std::printf("%s: %d x %d at %d bits is not rounded to nearest\n", name, n_out, n_in, bits);
      return false;
    }
  }
  return true;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  for (int round = 0; round < rounds; ++round) {
    const int longest = from_to(0, 9) ? 200 : 2500;  // beyond what is expanded at a time
    const int n_hidden = from_to(1, longest), n_inner = from_to(1, 200);
    const int n_tokens = from_to(1, 40);
    const moe::Gate gate{from_to(0, 5), 1, from_to(0, 1), 1.7f, 7.0f};
    Matrix first, second;
    fill(first, 2 * n_inner, n_hidden);
    fill(second, n_hidden, n_inner);
    std::vector<float> x(size_t(n_tokens) * n_hidden);
    for (float& value : x) value = float(from_to(-300, 300)) / 100;
    if (!from_to(0, 9)) x[from_to(0, int(x.size()) - 1)] = NAN;
    std::vector<float> product(size_t(n_tokens) * 2 * n_inner), out(x.size());
    std::vector<float> wanted_product, wanted_out;
    for (const char* name : {"scalar", "avx2", "avx512", "avx512vnni"}) {
      if (!moe::use_kernels(name)) continue;
      moe::set_threads(from_to(1, 3));
      moe::linear(first.weight, x.data(), n_tokens, product.data());
      moe::expert(first.weight, gate, second.weight, x.data(), n_tokens, out.data());
      if (moe::use_lookup(1, 40) && moe::use_lookup(2, 40)) {
        std::vector<float> looked_up(product.size()), found(out.size());
        moe::linear(first.weight, x.data(), n_tokens, looked_up.data());
        moe::expert(first.weight, gate, second.weight, x.data(), n_tokens, found.data());
        moe::use_lookup(1, 0), moe::use_lookup(2, 0);
        if (!same(product, looked_up) || !same(out, found)) {
          std::printf("%s: looked up in round %d it is something else\n", name, round);
          return 1;
        }
      }
      if (!pairs_agree(name) || !channels_agree(name) || !rounding_is_nearest(name)) return 1;
      if (wanted_product.empty()) wanted_product = product, wanted_out = out;
      // A code of the inner tokens may differ by one where exp is rounded otherwise.
      if (!agree(wanted_product, product, 1e-5) || !agree(wanted_out, out, 2e-2)) {
        std::printf("%s differs in round %d: %d x %d, %d tokens\n", name, round, n_inner, n_hidden,
                    n_tokens);
        return 1;
      }
    }
  }
  std::printf("%d rounds, nothing to report\n", rounds);
  return 0;
}
