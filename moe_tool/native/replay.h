// Replays layer calls through a cache of experts: moe_tool/policies/eviction, compiled. The Python
// classes there are the definition; integers alone decide, so that both agree exactly.
#pragma once
#include <cstdint>

namespace moe {

enum class EvictionCode : int32_t {
  kLru,
  kFifo,
  kLfu,
  kHobbit,
  kLayerLru,
  kSmoe,
  kExpertflow,
  kS3Fifo,
};

struct Calls {
  int64_t n_calls;
  int32_t n_layers, n_experts;
  const int32_t* layer;        // [n_calls] position of the layer
  const int64_t* start;        // [n_calls + 1] into keys
  const int32_t* keys;         // distinct within a call, ascending
  const uint16_t* scores;      // [n_calls, n_experts] or null
  const int64_t* guess_start;  // [n_calls + 1] into guesses, or null
  const int32_t* guesses;      // keys that later calls are predicted to name, next layer first
  const uint8_t* begins;       // [n_calls] whether a sequence begins with the call, or null
};

struct Replay {
  EvictionCode eviction;
  int64_t parameters[8];
  int64_t capacity;
  bool per_layer;  // every layer has its own equal part of the capacity
  const uint8_t* pinned;   // [n_layers * n_experts] or null
  int32_t prefetch_depth;  // layers that are read ahead, 0 for none
  bool is_cheaper;  // the cache holds a cheaper form
};

struct Counts {  // [n_calls] each
  uint16_t *hits, *prefetches, *prefetch_hits;
};

void replay(const Calls& calls, const Replay& how, const Counts& out);

// The caches of two forms under one policy: moe_tool/simulator/two_caches.py, compiled.
struct TwoForms {
  const uint8_t* answers;  // [n accesses] what answers if the primary form is not there, see below
  int64_t cheaper_capacity;
  uint8_t* given;  // [n accesses] what did answer
};
enum Answer : uint8_t { kWhole, kCheaper, kNothing };
struct TwoCounts {  // [n_calls] each
  uint16_t *uses, *misses, *cheaper_uses, *cheaper_misses;
};
void replay_two(const Calls& calls, const Replay& how, const TwoForms& forms, const TwoCounts& out);

// Depth of each access's expert in the priority stack when its call begins, 1 on top, 0 if it was
// never used: it hits in every cache of at least that capacity. By last use where next_use is null,
// else by next use: [n accesses], the number of the call that uses the same expert next.
void stack_depths(const Calls& calls, const int64_t* next_use, int32_t* depths);

}  // namespace moe
