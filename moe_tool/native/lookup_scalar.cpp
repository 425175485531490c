// Table lookup in plain C++, for every processor.
#include "lookup.h"
namespace moe {
namespace {

void pair_part(const uint8_t* codes, const uint8_t* tokens, ptrdiff_t token_stride, int n_tokens,
               int n_quads, int, const uint8_t* table, int shift, uint32_t* sums) {
  for (int t = 0; t < n_tokens; ++t) {
    uint32_t* const sum = sums + size_t(t) * kPairRows;
    for (int q = 0; q < n_quads; ++q) {
      const uint8_t* const pair = tokens + t * token_stride + 2 * q;
      const uint8_t *const low = table + pair[0], *const high = table + pair[1];
      const uint8_t* const byte = codes + size_t(q) * kPairRows;
      for (int r = 0; r < kPairRows; ++r)
        sum[r] += uint32_t(low[byte[r] & 15] + high[byte[r] >> 4]) << shift;
    }
  }
}

}  // namespace
const Lookup kLookupScalar{pair_part, nullptr, nullptr};
}  // namespace moe
