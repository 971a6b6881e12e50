// From a call's extents to what its launch needs. Lengths are the device's: nothing here depends on
// them.
#pragma once

#include <string>
#include <vector>

#include "call/problem.h"
#include "call/status.h"
#include "kernels/forward_cached/config.h"

namespace jax_fa3 {

// A group of CTAs has one for each kv head, which walk the same keys in step. With more kv heads
// than multiprocessors there is one group, whose CTAs take several heads one after another. Kernels
// whose blocks are rows take several rounds of heads, too, where that keeps more CTAs at work; then
// groups share all rounds.
struct ForwardCachedPlan {
  ForwardCachedKey key;
  int heads_at_once;  // kv heads, CTAs of a group
  int groups;
  int grid;
  std::int64_t workspace_bytes;  // partial results, two of each CTA
  std::int64_t num_counters;     // one for each CTA and what it folds by itself; 0 with one group
};

// Floats of a partial result: O, and of each column the reference and the sum.
constexpr std::int64_t partial_floats(const ForwardCachedKey& key) {
  return std::int64_t(key.block_rows) * (key.head_dim_v + 2);
}

// Counters of a CTA: rows are folded by their warpgroup, columns all together.
constexpr std::int64_t counters_of_cta(const ForwardCachedKey& key) {
  return has_columns(key) ? 1 : key.block_rows / 64;
}

// With is_ragged, shape.seqlen_q has the rows of all sequences; page_size is 0 without a table.
// `available` is the list of kernels to choose from (KernelTable has the compiled ones).
StatusOr<ForwardCachedPlan> plan_forward_cached(const Shape& shape, bool is_ragged, int page_size,
                                                const std::vector<ForwardCachedKey>& available,
                                                int num_sms);

std::string to_string(const ForwardCachedPlan& plan);

}  // namespace jax_fa3
