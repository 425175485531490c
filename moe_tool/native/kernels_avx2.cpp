// AVX2: the 16 lanes are two registers of eight.
#include <cstdint>
#include <cstring>
#include "lookup.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
namespace moe {
namespace {

struct Avx2 {
  struct Bytes { __m256i a, b; };
  using Sums = Bytes;
  struct Floats { __m256 a, b; };
  static constexpr int kTokens = 4, kChains = 1;
  static constexpr int kFloatRows = 2, kFloatTokens = 3;

  static Bytes load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static void store_bytes(uint8_t* p, Bytes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
  }
  static void prefetch_soon(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }
  static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
  template <int SHIFT, int MASK>
  static __m256i field_half(__m256i x) {
    if constexpr (SHIFT > 0) x = _mm256_srli_epi16(x, SHIFT);
    if constexpr (SHIFT < 0) x = _mm256_slli_epi16(x, -SHIFT);
    return _mm256_and_si256(x, _mm256_set1_epi8(MASK));
  }
  // (byte >> SHIFT) & MASK; what comes in from the neighbour is masked out.
  template <int SHIFT, int MASK>
  static Bytes field(Bytes x) {
    return {field_half<SHIFT, MASK>(x.a), field_half<SHIFT, MASK>(x.b)};
  }
  template <int SHIFT, int MASK>
  static Bytes add_field(Bytes u, Bytes x) {
    return {_mm256_or_si256(u.a, field_half<SHIFT, MASK>(x.a)),
            _mm256_or_si256(u.b, field_half<SHIFT, MASK>(x.b))};
  }

  static Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  // Sums of 16 bits: 8 times 2 * 15 * 127 fits. Wider codes are taken in two halves.
  template <int BITS>
  struct Partial {
    __m256i a, b, high_a, high_b;
  };
  template <int BITS>
  static Partial<BITS> no_partial() {
    const __m256i zero = _mm256_setzero_si256();
    return {zero, zero, zero, zero};
  }
  template <int BITS>
  static void add_dot(Partial<BITS>& sum, Bytes u, const int8_t* four) {
    int32_t word;
    memcpy(&word, four, 4);
    const __m256i a = _mm256_set1_epi32(word);
    if constexpr (BITS > 4) {
      const Bytes high = field<4, 15>(u);
      sum.high_a = _mm256_add_epi16(sum.high_a, _mm256_maddubs_epi16(high.a, a));
      sum.high_b = _mm256_add_epi16(sum.high_b, _mm256_maddubs_epi16(high.b, a));
      asm("" : "+x"(sum.high_a), "+x"(sum.high_b));
      u = field<0, 15>(u);
    }
    sum.a = _mm256_add_epi16(sum.a, _mm256_maddubs_epi16(u.a, a));
    sum.b = _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(u.b, a));
    // Left alone, gcc makes a tree of the eight additions and keeps all products until its end.
    asm("" : "+x"(sum.a), "+x"(sum.b));
  }
  template <int BITS>
  static Sums add(Sums x, const Partial<BITS>& y) {
    const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    if constexpr (BITS > 4) {
      x.a = _mm256_add_epi32(x.a, _mm256_madd_epi16(y.high_a, sixteen));
      x.b = _mm256_add_epi32(x.b, _mm256_madd_epi16(y.high_b, sixteen));
    }
    return {_mm256_add_epi32(x.a, _mm256_madd_epi16(y.a, one)),
            _mm256_add_epi32(x.b, _mm256_madd_epi16(y.b, one))};
  }
  static Sums scale_and_subtract(Sums x, int shift, int offset) {
    const __m256i o = _mm256_set1_epi32(offset);
    return {_mm256_sub_epi32(_mm256_slli_epi32(x.a, shift), o),
            _mm256_sub_epi32(_mm256_slli_epi32(x.b, shift), o)};
  }
  static Floats to_float(Sums x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

  static Floats no_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Floats times(Floats x, float b) {
    const __m256 f = _mm256_set1_ps(b);
    return {_mm256_mul_ps(x.a, f), _mm256_mul_ps(x.b, f)};
  }
  static Floats add_product(Floats sum, Floats x, Floats y) {
    return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)};
  }
  static Floats minus_product(Floats x, Floats y, float b) {
    const __m256 f = _mm256_set1_ps(b);
    return {_mm256_fnmadd_ps(y.a, f, x.a), _mm256_fnmadd_ps(y.b, f, x.b)};
  }
  static Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static __m256 half8(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static __m256 brain8(const void* p) {
    const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static Floats load_half(const uint16_t* p) { return {half8(p), half8(p + 8)}; }
  template <int KIND>
  static Floats load_kind(const uint8_t* p) {
    if (KIND == kFloat32) return load_floats(reinterpret_cast<const float*>(p));
    if (KIND == kFloat16) return {half8(p), half8(p + 16)};
    return {brain8(p), brain8(p + 16)};
  }
  static Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static float half(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
  static Floats signed_bytes(__m128i x) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
  }
  // 32 codes of 4 or 8 bits, less half their range.
  template <int BITS>
  static void load_codes(const uint8_t* p, Floats& low, Floats& high) {
    __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), b;
    if constexpr (BITS == 4) {
      const __m128i mask = _mm_set1_epi8(15);
      b = _mm_and_si128(_mm_srli_epi16(a, 4), mask);
      a = _mm_and_si128(a, mask);
    } else {
      b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
    }
    const __m128i offset = _mm_set1_epi8(char(1 << (BITS - 1)));
    low = signed_bytes(_mm_sub_epi8(a, offset));
    high = signed_bytes(_mm_sub_epi8(b, offset));
  }

  static Floats plus(Floats x, Floats y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
  }
  static Floats minus(Floats x, Floats y) {
    return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
  }
  static Floats product(Floats x, Floats y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
  }
  static Floats quotient(Floats x, Floats y) {
    return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
  }
  static Floats halves(float x, float y) { return {_mm256_set1_ps(x), _mm256_set1_ps(y)}; }
  static __m256i wide(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  // Eight numbers of the low four bits, of which `top` has the fourth in its sign.
  static __m256 numbers(Floats table, __m256i index, __m256i top) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.a, index),
                            _mm256_permutevar8x32_ps(table.b, index), _mm256_castsi256_ps(top));
  }
  // Numbers of the low and of the high halves of 16 bytes.
  static void nibbles(const uint8_t* p, Floats table, Floats& low, Floats& high) {
    const __m256i x = wide(p), y = wide(p + 8);
    low = {numbers(table, x, _mm256_slli_epi32(x, 28)), numbers(table, y, _mm256_slli_epi32(y, 28))};
    high = {numbers(table, _mm256_srli_epi32(x, 4), _mm256_slli_epi32(x, 24)),
            numbers(table, _mm256_srli_epi32(y, 4), _mm256_slli_epi32(y, 24))};
  }
  // Numbers of the K-th codes of sixteen words of eight; a load is cheaper than a shift.
  template <int K>
  static Floats numbers_of(Floats table, const uint8_t* words) {
    const Bytes x = load(words + K / 2);
    constexpr int kLow = 4 * (K % 2), kTop = 28 - kLow;
    return {numbers(table, _mm256_srli_epi32(x.a, kLow), _mm256_slli_epi32(x.a, kTop)),
            numbers(table, _mm256_srli_epi32(x.b, kLow), _mm256_slli_epi32(x.b, kTop))};
  }
  static Floats bytes(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(wide(p)), _mm256_cvtepi32_ps(wide(p + 8))};
  }
  // Numbers times 2**-8, which half has the exponents for.
  static Floats e4m3(const uint8_t* p) {
    const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(short(0xBFFF)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  }
  static Floats exponents(const uint8_t* p) {
    const __m256i least = _mm256_set1_epi32(1 << 22);
    return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(wide(p), 23), least)),
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(wide(p + 8), 23), least))};
  }
  static Sums load_sums(const int32_t* p) { return load(reinterpret_cast<const uint8_t*>(p)); }
  static Bytes look_up(Bytes table, Bytes index) {
    return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
  }
  static __m256i dot_half(__m256i sum, __m256i low, __m256i a, __m256i high, __m256i b, int by) {
    const __m256i one = _mm256_set1_epi16(1), factor = _mm256_set1_epi16(short(by));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(low, a), one));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(high, b), factor));
  }
  static Sums dot_nibbles(Sums s, Bytes low, Bytes a, Bytes high, Bytes b) {
    return {dot_half(s.a, low.a, a.a, high.a, b.a, 1), dot_half(s.b, low.b, a.b, high.b, b.b, 1)};
  }
  static Sums dot_bytes(Sums s, Bytes u, Bytes a) {  // in two halves: 2 * 255 * 127 needs more than 16 bits
    const Bytes low = field<0, 15>(u), high = field<4, 15>(u);
    return {dot_half(s.a, low.a, a.a, high.a, a.a, 16), dot_half(s.b, low.b, a.b, high.b, a.b, 16)};
  }
  // `n` numbers, up to eight, over the lanes, each for as many neighbours.
  using Spread = Bytes;
  static Spread spread(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), by = _mm256_set1_epi32(n);
    return {_mm256_srli_epi32(_mm256_mullo_epi32(lane, by), 4),
            _mm256_srli_epi32(
                _mm256_mullo_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(8)), by), 4)};
  }
  static Floats spread_out(const float* p, Spread by) {
    const __m256 x = _mm256_loadu_ps(p);
    return {_mm256_permutevar8x32_ps(x, by.a), _mm256_permutevar8x32_ps(x, by.b)};
  }
  static void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
  static float total(Floats x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

}  // namespace
}  // namespace moe
#include "kernels.inc"
#include "lookup_avx2.inc"
namespace moe {
const Kernels kAvx2 = kernels_named<Avx2>("avx2", &kLookupAvx2);
}
#endif
