#include "replay.h"

#include <algorithm>
#include <deque>
#include <list>
#include <vector>

namespace moe {
namespace {

constexpr int64_t kAbsent = int64_t(1) << 62;
constexpr int64_t kHigh = int64_t(1) << 60;

// Who may not leave: experts of the call under way, and those that a prefetch spares.
class Protected {
 public:
  explicit Protected(size_t n_keys) : mark_(n_keys, 0) {}
  void clear() { ++now_, layers_.clear(), n_ = 0; }
  void add(int32_t key, int32_t layer) {
    if (mark_[key] == now_) return;
    mark_[key] = now_, ++n_;
    if (std::find(layers_.begin(), layers_.end(), layer) == layers_.end()) layers_.push_back(layer);
  }
  bool has(int32_t key) const { return mark_[key] == now_; }
  bool touches(int32_t layer) const {
    return std::find(layers_.begin(), layers_.end(), layer) != layers_.end();
  }
  int64_t size() const { return n_; }

 private:
  std::vector<int64_t> mark_;
  std::vector<int32_t> layers_;
  int64_t now_ = 1, n_ = 0;
};

// The least rank first, equal ones by lower key. The least of a layer is kept until one of its
// experts changes, since a call changes few layers.
class Ranked {
 public:
  Ranked(const Calls& calls, const Replay&)
      : n_layers_(calls.n_layers),
        n_experts_(calls.n_experts),
        layer_(n_layers_),
        ranks_(size_t(n_layers_) * n_experts_, kAbsent),
        least_(n_layers_, -1),
        is_stale_(n_layers_, 0),
        layer_ranks_(n_layers_, 0) {}

  void begin_call(int32_t layer) {
    if (layer <= layer_) ++forward_;
    layer_ = layer;
  }
  void begin_sequence() {}
  void observe(const uint16_t*) {}
  void hear(int32_t) {}
  void expect(int32_t, int32_t) {}
  void rank(int32_t key, int64_t rank) {
    ranks_[key] = rank;
    is_stale_[key / n_experts_] = 1;
  }
  bool is_cached(int32_t key) const { return ranks_[key] != kAbsent; }
  void discard(int32_t key) { rank(key, kAbsent); }

  int32_t evict(const Protected* held) {
    int32_t victim = -1;
    int64_t best = 0;
    for (int32_t layer = 0; layer < n_layers_; ++layer) {
      const int32_t key = held && held->touches(layer) ? least_of(layer, held) : least_of(layer);
      if (key < 0) continue;
      const int64_t rank = ranks_[key] + layer_ranks_[layer];
      if (victim < 0 || rank < best) victim = key, best = rank;
    }
    if (victim >= 0) discard(victim);
    return victim;
  }

 protected:
  // Layer calls until each layer's turn, its own a whole round away.
  int64_t turns_until(int32_t layer) const {
    return (int64_t(layer) - layer_ - 1 + 2 * n_layers_) % n_layers_ + 1;
  }

  int32_t n_layers_, n_experts_, layer_;
  int64_t forward_ = 0;
  std::vector<int64_t> ranks_;

 private:
  int32_t least_of(int32_t layer) {
    if (is_stale_[layer]) least_[layer] = least_of(layer, nullptr), is_stale_[layer] = 0;
    return least_[layer];
  }
  int32_t least_of(int32_t layer, const Protected* held) const {
    const int32_t first = layer * n_experts_;
    const int64_t* const ranks = ranks_.data() + first;
    int64_t best = kAbsent;
    int32_t at = -1;
    for (int32_t e = 0; e < n_experts_; ++e)
      if (ranks[e] < best && !(held && held->has(first + e))) best = ranks[e], at = first + e;
    return at;
  }

  std::vector<int32_t> least_;
  std::vector<uint8_t> is_stale_;

 protected:
  std::vector<int64_t> layer_ranks_;
};

class Lru : public Ranked {
 public:
  using Ranked::Ranked;
  void touch(int32_t key) { rank(key, ++uses_); }
  void add(int32_t key) { touch(key); }

 private:
  int64_t uses_ = 0;
};

class Fifo : public Ranked {
 public:
  using Ranked::Ranked;
  void touch(int32_t) {}
  void add(int32_t key) { rank(key, ++arrivals_); }

 private:
  int64_t arrivals_ = 0;
};

class Lfu : public Ranked {
 public:
  Lfu(const Calls& calls, const Replay& how)
      : Ranked(calls, how),
        halve_every_(how.parameters[0]),
        counts_(ranks_.size(), 0),
        last_use_(ranks_.size(), 0) {}
  void begin_call(int32_t layer) {
    const int64_t before = forward_;
    Ranked::begin_call(layer);
    if (forward_ == before || forward_ % halve_every_) return;
    for (size_t key = 0; key < counts_.size(); ++key) {
      counts_[key] >>= 1;
      if (is_cached(int32_t(key))) place(int32_t(key));
    }
  }
  void touch(int32_t key) {
    counts_[key] = std::min<int64_t>(counts_[key] + 1, 1 << 20);
    last_use_[key] = ++uses_;
    place(key);
  }
  void add(int32_t key) { touch(key); }

 private:
  void place(int32_t key) { rank(key, (counts_[key] << 40) + last_use_[key]); }
  int64_t halve_every_, uses_ = 0;
  std::vector<int64_t> counts_, last_use_;
};

class Hobbit : public Ranked {
 public:
  Hobbit(const Calls& calls, const Replay& how)
      : Ranked(calls, how),
        of_last_(how.parameters[0]),
        of_uses_(how.parameters[1]),
        of_precise_(how.parameters[2]),
        of_distance_(how.parameters[3]),
        halve_every_(how.parameters[4]),
        is_reset_(how.parameters[5]),
        of_own_(how.parameters[6]),
        is_printed_(how.parameters[7]),
        is_cheaper_(how.is_cheaper),
        last_(ranks_.size(), 0),
        uses_(ranks_.size(), 0),
        precise_(ranks_.size(), 0) {}
  void begin_sequence() {
    if (!is_reset_) return;
    forward_ = tokens_ = 0;
    for (size_t key = 0; key < uses_.size(); ++key) last_[key] = uses_[key] = precise_[key] = 0;
    place_all();
  }
  void begin_call(int32_t layer) {
    const int64_t before = forward_;
    Ranked::begin_call(layer);
    if (forward_ != before) {
      if (halve_every_ && forward_ % halve_every_ == 0) {
        tokens_ >>= 1;
        for (size_t key = 0; key < uses_.size(); ++key) uses_[key] >>= 1, precise_[key] >>= 1;
        place_all();
      }
      ++tokens_;
    }
    for (int32_t l = 0; l < n_layers_; ++l) {
      const int64_t until = turns_until(l);
      layer_ranks_[l] = tokens_ * of_distance_ * (is_printed_ ? until : n_layers_ - until + 1);
    }
  }
  void touch(int32_t key) { count(key, of_own_ || !is_cheaper_), place(key); }
  void add(int32_t key) { touch(key); }
  void hear(int32_t key) {
    count(key, !of_own_ && is_cheaper_);
    if (is_cached(key)) place(key);
  }

 private:
  void count(int32_t key, bool is_precise) {
    last_[key] = forward_, ++uses_[key], precise_[key] += is_precise;
  }
  void place(int32_t key) {
    rank(key, n_layers_ * (of_last_ * last_[key] + of_uses_ * uses_[key] + of_precise_ * precise_[key]));
  }
  void place_all() {
    for (size_t key = 0; key < uses_.size(); ++key)
      if (is_cached(int32_t(key))) place(int32_t(key));
  }
  int64_t of_last_, of_uses_, of_precise_, of_distance_, halve_every_, is_reset_, tokens_ = 0;
  bool of_own_, is_printed_, is_cheaper_;
  std::vector<int64_t> last_, uses_, precise_;
};

class LayerLru : public Ranked {
 public:
  LayerLru(const Calls& calls, const Replay& how) : Ranked(calls, how), age_(how.parameters[0]) {}
  void begin_call(int32_t layer) {
    Ranked::begin_call(layer);
    for (int32_t l = 0; l < n_layers_; ++l) layer_ranks_[l] = -100 * turns_until(l);
  }
  void touch(int32_t key) { rank(key, age_ * n_layers_ * forward_); }
  void add(int32_t key) { touch(key); }

 private:
  int64_t age_;
};

class Smoe : public Ranked {
 public:
  Smoe(const Calls& calls, const Replay& how)
      : Ranked(calls, how),
        window_(how.parameters[0]),
        seen_(ranks_.size() * window_, 0),
        sums_(ranks_.size(), 0),
        means_(ranks_.size(), 0),
        n_seen_(n_layers_, 0) {}
  void observe(const uint16_t* scores) {
    const int64_t first = int64_t(layer_) * n_experts_;
    uint16_t* const old = &seen_[(first * window_) + (n_seen_[layer_] % window_) * n_experts_];
    const int64_t n = std::min(++n_seen_[layer_], window_);
    for (int32_t e = 0; e < n_experts_; ++e) {
      sums_[first + e] += int64_t(scores[e]) - old[e];
      old[e] = scores[e];
      means_[first + e] = (sums_[first + e] << 8) / n;
      if (is_cached(int32_t(first + e))) rank(int32_t(first + e), means_[first + e]);
    }
  }
  void touch(int32_t key) { rank(key, means_[key]); }
  void add(int32_t key) { touch(key); }

 private:
  int64_t window_;
  std::vector<uint16_t> seen_;  // [layers, window, experts]
  std::vector<int64_t> sums_, means_, n_seen_;
};

class Expertflow : public Ranked {
 public:
  Expertflow(const Calls& calls, const Replay& how)
      : Ranked(calls, how),
        window_(how.parameters[0]),
        order_(ranks_.size(), 0),
        high_until_(ranks_.size(), -1) {}
  void begin_call(int32_t layer) {
    Ranked::begin_call(layer);
    ++call_;
    // Whose time in the high tier is over goes back to its place in the low one.
    for (; !raised_.empty() && raised_.front().first < call_; raised_.pop_front()) {
      const int32_t key = raised_.front().second;
      if (high_until_[key] < call_ && is_cached(key)) rank(key, order_[key]);
    }
  }
  void touch(int32_t key) {
    order_[key] = ++uses_;
    raise(key, call_ + window_);
    rank(key, kHigh + order_[key]);
  }
  void add(int32_t key) { touch(key); }
  void expect(int32_t key, int32_t ahead) {
    if (ahead > window_) return;
    raise(key, call_ + ahead);
    if (is_cached(key)) rank(key, kHigh + order_[key]);
  }

 private:
  void raise(int32_t key, int64_t call) {
    if (call <= high_until_[key]) return;
    high_until_[key] = call;
    const auto at = std::upper_bound(
        raised_.begin(), raised_.end(), call,
        [](int64_t wanted, const std::pair<int64_t, int32_t>& entry) { return wanted < entry.first; });
    raised_.insert(at, {call, key});
  }
  int64_t window_, call_ = 0, uses_ = 0;
  std::vector<int64_t> order_, high_until_;
  std::deque<std::pair<int64_t, int32_t>> raised_;  // by the call that it ends with
};

// A queue of keys with removal from the middle, in arrays.
class Queue {
 public:
  explicit Queue(int32_t n_keys) : next_(n_keys + 1), before_(n_keys + 1, -1), end_(n_keys) {
    next_[end_] = before_[end_] = end_;
  }
  bool has(int32_t key) const { return before_[key] >= 0; }
  int64_t size() const { return size_; }
  void push(int32_t key) {
    const int32_t last = before_[end_];
    next_[last] = key, before_[key] = last, next_[key] = end_, before_[end_] = key;
    ++size_;
  }
  int32_t pop() {
    const int32_t key = next_[end_];
    erase(key);
    return key;
  }
  void erase(int32_t key) {
    next_[before_[key]] = next_[key], before_[next_[key]] = before_[key];
    before_[key] = -1;
    --size_;
  }

 private:
  std::vector<int32_t> next_, before_;
  int32_t end_;
  int64_t size_ = 0;
};

class S3Fifo {
 public:
  S3Fifo(const Calls& calls, const Replay& how)
      : n_small_(std::max<int64_t>(1, how.capacity * how.parameters[0] / 100)),
        n_ghosts_(std::max<int64_t>(1, how.capacity - n_small_)),
        uses_(size_t(calls.n_layers) * calls.n_experts, -1),
        small_(int32_t(uses_.size())),
        main_(int32_t(uses_.size())),
        ghosts_(int32_t(uses_.size())) {}
  void begin_sequence() {}
  void begin_call(int32_t) {}
  void observe(const uint16_t*) {}
  void hear(int32_t) {}
  void expect(int32_t, int32_t) {}
  void touch(int32_t key) { uses_[key] = std::min(uses_[key] + 1, 3); }
  void add(int32_t key) {
    uses_[key] = 0, ++n_cached_;
    if (ghosts_.has(key))
      ghosts_.erase(key), main_.push(key);
    else
      small_.push(key);
  }
  void discard(int32_t key) {
    uses_[key] = -1, --n_cached_;
    if (small_.has(key)) small_.erase(key);
    if (main_.has(key)) main_.erase(key);
  }
  int32_t evict(const Protected* held) {
    if (!has_victim(held)) return -1;
    for (int64_t skipped = 0;;) {
      int32_t key;
      const bool is_main_held = small_.size() > 0 && skipped >= main_.size();
      if (small_.size() > n_small_ || is_main_held) {
        key = small_.pop();
        if (!is_held(held, key) && uses_[key] == 0) {
          ghosts_.push(key);
          if (ghosts_.size() > n_ghosts_) ghosts_.pop();
          uses_[key] = -1, --n_cached_;
          return key;
        }
        uses_[key] = 0;
      } else {
        key = main_.pop();
        if (!is_held(held, key)) {
          if (uses_[key] == 0) {
            uses_[key] = -1, --n_cached_;
            return key;
          }
          --uses_[key];
        } else {
          ++skipped;
        }
      }
      main_.push(key);
    }
  }

 private:
  static bool is_held(const Protected* held, int32_t key) { return held && held->has(key); }
  bool has_victim(const Protected* held) const {
    if (!held || n_cached_ > held->size()) return n_cached_ > 0;
    for (size_t key = 0; key < uses_.size(); ++key)
      if (uses_[key] >= 0 && !held->has(int32_t(key))) return true;
    return false;
  }
  int64_t n_small_, n_ghosts_, n_cached_ = 0;
  std::vector<int32_t> uses_;
  Queue small_, main_, ghosts_;
};

template <class Eviction>
void replay_with(const Calls& calls, const Replay& how, const Counts& out) {
  const int64_t n_keys = int64_t(calls.n_layers) * calls.n_experts;
  const int32_t n_parts = how.per_layer ? calls.n_layers : 1;
  std::vector<Eviction> policies;
  std::vector<int64_t> rooms;
  for (int32_t part = 0; part < n_parts; ++part) {
    Replay own = how;
    own.capacity = how.capacity / n_parts + (part < how.capacity % n_parts);
    policies.emplace_back(calls, own);
    rooms.push_back(own.capacity);
  }
  std::vector<uint8_t> is_cached(n_keys, 0), was_hit(n_keys, 0), is_guess(n_keys, 0);
  std::vector<std::vector<int32_t>> pending(calls.n_layers);  // prefetched for a layer's next call
  Protected held(n_keys);
  const auto is_pinned = [&](int32_t key) { return how.pinned && how.pinned[key]; };
  const auto part_of = [&](int32_t layer) { return how.per_layer ? layer : 0; };
  const auto make_room = [&](int32_t part, const Protected* spared) {
    if (rooms[part] > 0) return --rooms[part], true;
    const int32_t victim = policies[part].evict(spared);
    if (victim < 0) return false;
    is_cached[victim] = 0, is_guess[victim] = 0;
    return true;
  };
  for (int64_t c = 0; c < calls.n_calls; ++c) {
    if (calls.begins && calls.begins[c])
      for (Eviction& each : policies) each.begin_sequence();
    const int32_t layer = calls.layer[c];
    const int32_t *const first = calls.keys + calls.start[c], *const last = calls.keys + calls.start[c + 1];
    held.clear();
    for (const int32_t* key = first; key < last; ++key) held.add(*key, layer);
    const int32_t part = part_of(layer);
    Eviction& policy = policies[part];
    int prefetches = 0, prefetch_hits = 0, hits = 0;
    for (const int32_t key : pending[layer]) {
      if (!is_guess[key]) continue;  // it had to leave before its turn
      is_guess[key] = 0;
      if (held.has(key)) {
        ++prefetch_hits;
      } else {
        policy.discard(key);
        is_cached[key] = 0, ++rooms[part];
      }
    }
    pending[layer].clear();
    policy.begin_call(layer);
    if (calls.scores) policy.observe(calls.scores + c * calls.n_experts);
    for (const int32_t* key = first; key < last; ++key) {
      was_hit[*key] = is_cached[*key];
      hits += is_cached[*key] || is_pinned(*key);
    }
    for (const int32_t* key = first; key < last; ++key) {
      if (is_pinned(*key)) continue;
      if (was_hit[*key]) {
        if (is_cached[*key]) policy.touch(*key);  // or an expert of the same call took its place
        continue;
      }
      if (!make_room(part, &held)) make_room(part, nullptr);
      policy.add(*key);
      is_cached[*key] = 1;
    }
    if (calls.guess_start) {
      const int32_t* guess = calls.guesses + calls.guess_start[c];
      const int32_t* const end = calls.guesses + calls.guess_start[c + 1];
      for (const int32_t* key = guess; key < end; ++key) {
        const int32_t target = *key / calls.n_experts;
        policies[part_of(target)].expect(*key, how.per_layer ? 1 : target - layer);
      }
      // Looks past a layer only if all that it is predicted to name is there.
      for (int32_t ahead = 1; ahead <= how.prefetch_depth && guess < end; ++ahead) {
        const int32_t target = layer + ahead;
        const int32_t* stop = guess;
        while (stop < end && *stop / calls.n_experts == target) ++stop;
        for (const int32_t* key = guess; key < stop; ++key) held.add(*key, target);
        bool is_all_there = true;
        for (const int32_t* key = guess; key < stop; ++key) {
          if (is_cached[*key] || is_pinned(*key)) continue;
          is_all_there = false;
          if (!make_room(part_of(target), &held)) break;
          policies[part_of(target)].add(*key);
          is_cached[*key] = is_guess[*key] = 1, ++prefetches;
          pending[target].push_back(*key);
        }
        if (!is_all_there) break;
        guess = stop;
      }
    }
    out.hits[c] = uint16_t(hits);
    out.prefetches[c] = uint16_t(prefetches);
    out.prefetch_hits[c] = uint16_t(prefetch_hits);
  }
}

// A cache without pins and prefetches: expert_cache.py.
template <class Eviction>
class Cache {
 public:
  Cache(const Calls& calls, const Replay& how)
      : per_layer_(how.per_layer),
        is_cached_(size_t(calls.n_layers) * calls.n_experts, 0),
        was_hit_(is_cached_.size(), 0),
        held_(is_cached_.size()) {
    const int32_t n_parts = per_layer_ ? calls.n_layers : 1;
    for (int32_t part = 0; part < n_parts; ++part) {
      Replay own = how;
      own.capacity = how.capacity / n_parts + (part < how.capacity % n_parts);
      policies_.emplace_back(calls, own);
      rooms_.push_back(own.capacity);
    }
  }
  bool has(int32_t key) const { return is_cached_[key]; }
  void begin_sequence() {
    for (Eviction& each : policies_) each.begin_sequence();
  }
  uint16_t use(int32_t layer, const uint16_t* scores, const std::vector<int32_t>& keys,
               const std::vector<int32_t>& elsewhere) {
    const int32_t part = per_layer_ ? layer : 0;
    Eviction& policy = policies_[part];
    policy.begin_call(layer);
    if (scores) policy.observe(scores);
    for (const int32_t key : elsewhere) policy.hear(key);
    held_.clear();
    for (const int32_t key : keys) held_.add(key, layer), was_hit_[key] = is_cached_[key];
    uint16_t misses = 0;
    for (const int32_t key : keys) {
      if (was_hit_[key]) {
        if (is_cached_[key]) policy.touch(key);  // or an expert of the same call took its place
        continue;
      }
      ++misses;
      if (rooms_[part] > 0) {
        --rooms_[part];
      } else {
        int32_t victim = policy.evict(&held_);
        if (victim < 0) victim = policy.evict(nullptr);
        is_cached_[victim] = 0;
      }
      policy.add(key);
      is_cached_[key] = 1;
    }
    return misses;
  }

 private:
  bool per_layer_;
  std::vector<uint8_t> is_cached_, was_hit_;
  Protected held_;
  std::vector<Eviction> policies_;
  std::vector<int64_t> rooms_;
};

template <class Eviction>
void replay_two_with(const Calls& calls, const Replay& how, const TwoForms& forms,
                     const TwoCounts& out) {
  Replay of_cheaper = how;
  of_cheaper.capacity = forms.cheaper_capacity, of_cheaper.is_cheaper = true;
  Cache<Eviction> whole(calls, how), cheaper(calls, of_cheaper);
  std::vector<int32_t> high, low;
  for (int64_t c = 0; c < calls.n_calls; ++c) {
    if (calls.begins && calls.begins[c]) whole.begin_sequence(), cheaper.begin_sequence();
    high.clear(), low.clear();
    for (int64_t a = calls.start[c]; a < calls.start[c + 1]; ++a) {
      const int32_t key = calls.keys[a];
      const uint8_t given = whole.has(key) ? uint8_t(kWhole) : forms.answers[a];
      forms.given[a] = given;
      if (given == kWhole)
        high.push_back(key);
      else if (given == kCheaper)
        low.push_back(key);
    }
    const uint16_t* const scores = calls.scores ? calls.scores + c * calls.n_experts : nullptr;
    out.uses[c] = uint16_t(high.size()), out.cheaper_uses[c] = uint16_t(low.size());
    out.misses[c] = whole.use(calls.layer[c], scores, high, low);
    out.cheaper_misses[c] = cheaper.use(calls.layer[c], scores, low, high);
  }
}

}  // namespace

void replay_two(const Calls& calls, const Replay& how, const TwoForms& forms, const TwoCounts& out) {
  switch (how.eviction) {
    case EvictionCode::kLru: return replay_two_with<Lru>(calls, how, forms, out);
    case EvictionCode::kFifo: return replay_two_with<Fifo>(calls, how, forms, out);
    case EvictionCode::kLfu: return replay_two_with<Lfu>(calls, how, forms, out);
    case EvictionCode::kHobbit: return replay_two_with<Hobbit>(calls, how, forms, out);
    case EvictionCode::kLayerLru: return replay_two_with<LayerLru>(calls, how, forms, out);
    case EvictionCode::kSmoe: return replay_two_with<Smoe>(calls, how, forms, out);
    case EvictionCode::kExpertflow: return replay_two_with<Expertflow>(calls, how, forms, out);
    case EvictionCode::kS3Fifo: return replay_two_with<S3Fifo>(calls, how, forms, out);
  }
}

void replay(const Calls& calls, const Replay& how, const Counts& out) {
  switch (how.eviction) {
    case EvictionCode::kLru: return replay_with<Lru>(calls, how, out);
    case EvictionCode::kFifo: return replay_with<Fifo>(calls, how, out);
    case EvictionCode::kLfu: return replay_with<Lfu>(calls, how, out);
    case EvictionCode::kHobbit: return replay_with<Hobbit>(calls, how, out);
    case EvictionCode::kLayerLru: return replay_with<LayerLru>(calls, how, out);
    case EvictionCode::kSmoe: return replay_with<Smoe>(calls, how, out);
    case EvictionCode::kExpertflow: return replay_with<Expertflow>(calls, how, out);
    case EvictionCode::kS3Fifo: return replay_with<S3Fifo>(calls, how, out);
  }
}

void stack_depths(const Calls& calls, const int64_t* next_use, int32_t* depths) {
  const int32_t n_keys = calls.n_layers * calls.n_experts;
  std::vector<int32_t> stack, place(n_keys, -1);
  std::vector<int64_t> priority(n_keys, 0);  // the call of the next use; the least stays on top
  stack.reserve(n_keys);
  for (int64_t c = 0; c < calls.n_calls; ++c) {
    const int64_t begin = calls.start[c], end = calls.start[c + 1];
    for (int64_t a = begin; a < end; ++a) {
      const int32_t key = calls.keys[a];
      depths[a] = place[key] + 1;
      priority[key] = -1;  // an expert of the call stays until the call is over
    }
    for (int64_t a = begin; a < end; ++a) {
      const int32_t key = calls.keys[a];
      const int32_t at = place[key] < 0 ? int32_t(stack.size()) : place[key];
      if (at == int32_t(stack.size())) stack.push_back(key);
      int32_t carried = key;
      if (!next_use) {
        for (int32_t i = 0; i <= at; ++i) {
          std::swap(carried, stack[i]);
          place[stack[i]] = i;
        }
        continue;
      }
      // Each capacity gives up the one of its content that is used last; the deepest place is the
      // one that the expert came from.
      carried = stack[0], stack[0] = key, place[key] = 0;
      for (int32_t i = 1; i <= at; ++i) {
        if (i == at) {
          stack[i] = carried, place[carried] = i;
        } else if (priority[stack[i]] > priority[carried] ||
                   (priority[stack[i]] == priority[carried] && stack[i] < carried)) {
          std::swap(carried, stack[i]);
          place[stack[i]] = i;
        }
      }
    }
    if (next_use)
      for (int64_t a = begin; a < end; ++a) priority[calls.keys[a]] = next_use[a];
  }
}

}  // namespace moe
