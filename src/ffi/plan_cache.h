// Remembers the plans of calls seen before: planning walks the schedule, and a handler runs at
// every execution outside a command buffer.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "call/problem.h"
#include "call/status.h"

namespace jax_fa3 {

// Parts of a key, as tuples that have an order.
inline auto key_part(const Shape& s) {
  return std::tuple(s.dtype, s.batch, s.seqlen_q, s.seqlen_k, s.num_heads_q, s.num_heads_kv,
                    s.head_dim, s.head_dim_v);
}
inline auto key_part(const MaskOptions& mask) {
  return std::tuple(mask.window_left, mask.window_right, mask.query_offset);
}
inline auto key_part(const IndexPresence& presence) {
  return std::tuple(presence.any, presence.visibility, presence.variant);
}
inline auto key_part(int number) { return std::tuple(number); }
inline auto key_part(bool choice) { return std::tuple(choice); }

// Plans by what they depend on.
template <class Plan, class... Inputs>
class PlanCache {
 public:
  // The plan of the inputs, made by make(inputs...) the first time.
  template <class Make>
  StatusOr<Plan> get(const Make& make, const Inputs&... inputs) {
    const Key key = std::tuple_cat(key_part(inputs)...);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return found->second;
    }
    const StatusOr<Plan> plan = make(inputs...);
    if (!plan.ok()) return plan;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kCapacity) plans_.clear();
    plans_.emplace(key, plan.value());
    return plan;
  }

 private:
  using Key = decltype(std::tuple_cat(key_part(std::declval<const Inputs&>())...));
  static constexpr std::size_t kCapacity = 4096;

  std::mutex mutex_;
  std::map<Key, Plan> plans_;
};

}  // namespace jax_fa3
