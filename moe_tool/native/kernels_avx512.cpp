// AVX-512 without VNNI.
#include <cstdint>
#include <cstring>
#include "lookup.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>
#define MOE_VNNI 0
#include "avx512.inc"
#include "kernels.inc"
namespace moe {
const Kernels kAvx512 = kernels_named<Avx512>("avx512", &kLookupAvx2);
}
#endif
