// Remembers the plans of calls seen before: planning walks the schedule, and a handler runs at
// every execution outside a command buffer.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "call/problem.h"
#include "call/status.h"

namespace jax_fa3 {

template <class Plan>
class PlanCache {
 public:
  // The plan of (shape, mask, variant), made by make() the first time. `variant` is what else the
  // plan depends on.
  template <class Make>
  StatusOr<Plan> get(const Shape& shape, const MaskOptions& mask, int variant, const Make& make) {
    const Key key{shape.dtype,       shape.batch,        shape.seqlen_q,    shape.seqlen_k,
                  shape.num_heads_q, shape.num_heads_kv, shape.head_dim,    shape.head_dim_v,
                  mask.window_left,  mask.window_right,  mask.query_offset, variant};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return found->second;
    }
    const StatusOr<Plan> plan = make();
    if (!plan.ok()) return plan;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kCapacity) plans_.clear();
    plans_.emplace(key, plan.value());
    return plan;
  }

 private:
  using Key =
      std::tuple<DType, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                 std::int64_t, std::int64_t, std::int32_t, std::int32_t, std::int32_t, int>;
  static constexpr std::size_t kCapacity = 4096;

  std::mutex mutex_;
  std::map<Key, Plan> plans_;
};

}  // namespace jax_fa3
