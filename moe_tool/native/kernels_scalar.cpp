// Plain C++, for every processor, and what the others are tested against.
#include <cmath>
#include <cstdint>
#include <cstring>
#include "lookup.h"
namespace moe {
namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
  float size;
  if (exponent == 31) {
    size = fraction ? NAN : INFINITY;
  } else {
    size = exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25)
                    : std::ldexp(float(fraction), -24);
  }
  return h >> 15 ? -size : size;
}

struct Scalar {
  struct Bytes { uint8_t v[64]; };
  struct Sums { int32_t v[16]; };
  struct Floats { float v[16]; };
  static constexpr int kTokens = 4, kChains = 1;
  static constexpr int kFloatRows = 4, kFloatTokens = 4;

  static Bytes load(const uint8_t* p) {
    Bytes x;
    memcpy(x.v, p, 64);
    return x;
  }
  static void store_bytes(uint8_t* p, const Bytes& x) { memcpy(p, x.v, 64); }
  static void prefetch_soon(const uint8_t*) {}
  static void prefetch(const uint8_t*) {}
  template <int SHIFT, int MASK>
  static Bytes field(Bytes x) {
    for (uint8_t& b : x.v) b = uint8_t((SHIFT < 0 ? b << (SHIFT < 0 ? -SHIFT : 0) : b >> (SHIFT < 0 ? 0 : SHIFT)) & MASK);
    return x;
  }
  template <int SHIFT, int MASK>
  static Bytes add_field(Bytes u, const Bytes& x) {
    const Bytes more = field<SHIFT, MASK>(x);
    for (int i = 0; i < 64; ++i) u.v[i] |= more.v[i];
    return u;
  }

  static Sums no_sums() { return {}; }
  template <int BITS>
  using Partial = Sums;
  template <int BITS>
  static Sums no_partial() { return {}; }
  template <int BITS>
  static void add_dot(Sums& sum, const Bytes& u, const int8_t* four) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 4; ++j) sum.v[i] += int32_t(u.v[4 * i + j]) * four[j];
  }
  template <int BITS>
  static Sums add(Sums x, const Sums& y) {
    for (int i = 0; i < 16; ++i) x.v[i] += y.v[i];
    return x;
  }
  static Sums scale_and_subtract(Sums x, int shift, int offset) {
    for (int32_t& s : x.v) s = s * (1 << shift) - offset;
    return x;
  }
  static Floats to_float(const Sums& x) {
    Floats f;
    for (int i = 0; i < 16; ++i) f.v[i] = float(x.v[i]);
    return f;
  }

  static Floats no_floats() { return {}; }
  static Floats times(Floats x, float b) {
    for (float& f : x.v) f *= b;
    return x;
  }
  static Floats add_product(Floats sum, const Floats& x, const Floats& y) {
    for (int i = 0; i < 16; ++i) sum.v[i] += x.v[i] * y.v[i];
    return sum;
  }
  static Floats minus_product(Floats x, const Floats& y, float b) {
    for (int i = 0; i < 16; ++i) x.v[i] -= y.v[i] * b;
    return x;
  }
  static Floats load_floats(const float* p) {
    Floats x;
    memcpy(x.v, p, sizeof x.v);
    return x;
  }
  static Floats load_half(const uint16_t* p) {
    Floats x;
    for (int i = 0; i < 16; ++i) x.v[i] = half_to_float(p[i]);
    return x;
  }
  template <int KIND>
  static Floats load_kind(const uint8_t* p) {
    if (KIND == kFloat32) return load_floats(reinterpret_cast<const float*>(p));
    uint16_t raw[16];
    memcpy(raw, p, sizeof raw);
    if (KIND == kFloat16) return load_half(raw);
    Floats x;
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = uint32_t(raw[i]) << 16;
      memcpy(&x.v[i], &bits, 4);
    }
    return x;
  }
  static Floats all(float x) {
    Floats f;
    for (float& each : f.v) each = x;
    return f;
  }
  static float half(uint16_t h) { return half_to_float(h); }
  // 32 codes of 4 or 8 bits, less half their range.
  template <int BITS>
  static void load_codes(const uint8_t* p, Floats& low, Floats& high) {
    for (int i = 0; i < 16; ++i) {
      low.v[i] = float((BITS == 4 ? p[i] & 15 : p[i]) - (1 << (BITS - 1)));
      high.v[i] = float((BITS == 4 ? p[i] >> 4 : p[i + 16]) - (1 << (BITS - 1)));
    }
  }

  template <class F>
  static Floats each(F&& of) {
    Floats x;
    for (int i = 0; i < 16; ++i) x.v[i] = of(i);
    return x;
  }
  static Floats plus(const Floats& x, const Floats& y) {
    return each([&](int i) { return x.v[i] + y.v[i]; });
  }
  static Floats minus(const Floats& x, const Floats& y) {
    return each([&](int i) { return x.v[i] - y.v[i]; });
  }
  static Floats product(const Floats& x, const Floats& y) {
    return each([&](int i) { return x.v[i] * y.v[i]; });
  }
  static Floats quotient(const Floats& x, const Floats& y) {
    return each([&](int i) { return x.v[i] / y.v[i]; });
  }
  static Floats halves(float x, float y) {
    return each([&](int i) { return i < 8 ? x : y; });
  }
  // Numbers of the low and of the high halves of 16 bytes.
  static void nibbles(const uint8_t* p, const Floats& table, Floats& low, Floats& high) {
    low = each([&](int i) { return table.v[p[i] & 15]; });
    high = each([&](int i) { return table.v[p[i] >> 4]; });
  }
  // Numbers of the K-th codes of sixteen words of eight.
  template <int K>
  static Floats numbers_of(const Floats& table, const uint8_t* words) {
    return each([&](int i) { return table.v[words[4 * i + K / 2] >> K % 2 * 4 & 15]; });
  }
  static Floats bytes(const uint8_t* p) {
    return each([&](int i) { return float(p[i]); });
  }
  static Floats e4m3(const uint8_t* p) {  // numbers times 2**-8, which half has the exponents for
    return each([&](int i) {
      return half_to_float(uint16_t((p[i] & 128) << 8 | (p[i] & 127) << 7));
    });
  }
  static Floats exponents(const uint8_t* p) {
    return each([&](int i) { return std::ldexp(1.0f, int(p[i]) - 127); });
  }
  static Bytes look_up(const Bytes& table, Bytes index) {
    for (uint8_t& b : index.v) b = table.v[b];
    return index;
  }
  static Sums load_sums(const int32_t* p) {
    Sums x;
    memcpy(x.v, p, sizeof x.v);
    return x;
  }
  static Sums dot_bytes(Sums sum, const Bytes& u, const Bytes& a) {
    for (int i = 0; i < 64; ++i) sum.v[i / 4] += int32_t(u.v[i]) * int8_t(a.v[i]);
    return sum;
  }
  static Sums dot_nibbles(const Sums& sum, const Bytes& low, const Bytes& a, const Bytes& high,
                          const Bytes& b) {
    return dot_bytes(dot_bytes(sum, low, a), high, b);
  }
  // `n` numbers over the lanes, each for as many neighbours.
  using Spread = int;
  static Spread spread(int n) { return n; }
  static Floats spread_out(const float* p, Spread n) {
    return each([&](int i) { return p[i * n / 16]; });
  }
  static void store(float* p, const Floats& x) { memcpy(p, x.v, sizeof x.v); }
  static float total(const Floats& x) {
    float sum = 0;
    for (float f : x.v) sum += f;
    return sum;
  }
};

}  // namespace
}  // namespace moe
#include "kernels.inc"
namespace moe {
const Kernels kScalar = kernels_named<Scalar>("scalar", &kLookupScalar);
}
