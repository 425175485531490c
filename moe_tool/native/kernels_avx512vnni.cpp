// AVX-512 with VNNI: four products of bytes are summed into 32 bits by one instruction.
#include <cstdint>
#include <cstring>
#include "lookup.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include <immintrin.h>
#define MOE_VNNI 1
#include "avx512.inc"
#include "kernels.inc"
namespace moe {
const Kernels kAvx512Vnni = kernels_named<Avx512>("avx512vnni", &kLookupAvx2);
}
#endif
