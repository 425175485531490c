// AVX2: the 16 lanes are two registers of eight.
#include <cstdint>
#include <cstring>
#include "matrix.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
namespace moe {
namespace {

struct Avx2 {
  struct Bytes { __m256i a, b; };
  using Sums = Bytes;
  struct Floats { __m256 a, b; };

  static Bytes load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static void store_bytes(uint8_t* p, Bytes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
  }
  static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0);
  }
  template <int SHIFT, int MASK>
  static Bytes low_bits(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(MASK);
    if (!SHIFT) return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, SHIFT), mask),
            _mm256_and_si256(_mm256_srli_epi16(x.b, SHIFT), mask)};
  }
  template <int SHIFT>
  static Bytes append(Bytes high, Bytes low) {
    return {_mm256_or_si256(_mm256_slli_epi16(high.a, SHIFT), low.a),
            _mm256_or_si256(_mm256_slli_epi16(high.b, SHIFT), low.b)};
  }

  static Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Sums add(Sums x, Sums y) {
    return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
  }
  template <int BITS>
  static __m256i dot_half(__m256i sum, __m256i u, __m256i a) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (BITS < 8)  // 2 * 127 * 127 fits into 16 bits
      return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, a), ones));
    const __m256i low = _mm256_and_si256(u, _mm256_set1_epi8(0x7F));
    const __m256i top = _mm256_andnot_si256(_mm256_set1_epi8(0x7F), u);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(low, a), ones));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(top, a), ones));
  }
  template <int BITS>
  static Sums dot(Sums sum, Bytes u, const int8_t* four) {
    int32_t word;
    memcpy(&word, four, 4);
    const __m256i a = _mm256_set1_epi32(word);
    return {dot_half<BITS>(sum.a, u.a, a), dot_half<BITS>(sum.b, u.b, a)};
  }
  static Sums scale_and_subtract(Sums x, int factor, int offset) {
    if (factor == 2) x = add(x, x);
    const __m256i o = _mm256_set1_epi32(offset);
    return {_mm256_sub_epi32(x.a, o), _mm256_sub_epi32(x.b, o)};
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
namespace moe {
const Kernels kAvx2 = kernels_named<Avx2>("avx2");
}
#endif
