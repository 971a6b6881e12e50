#include "kernels/forward_cached/plan.h"

#include <algorithm>

#include "attention/pages.h"
#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

// Packed rows of all sequences and kv heads, and sequences. With them the units of a call
// (splits.h) are below 2^52, and their products with a number of multiprocessors below 2^63.
constexpr std::int64_t kMostRows = std::int64_t{1} << 30;
constexpr std::int64_t kMostSequences = std::int64_t{1} << 28;

Status check_most(const char* what, std::int64_t got, std::int64_t most) {
  if (got <= most) return {};
  return invalid_argument(concat(what, " must be at most ", most, ", got ", got));
}

// The kernel with the smallest blocks that takes a sequence's rows at once, or that with the
// largest. Of ragged rows all but one of each other sequence may be one's.
ForwardCachedKey choose(const Shape& shape, bool is_ragged, std::vector<ForwardCachedKey> keys) {
  std::sort(keys.begin(), keys.end(), [](const ForwardCachedKey& a, const ForwardCachedKey& b) {
    return a.block_rows < b.block_rows;
  });
  const std::int64_t sharing = shape.num_heads_q / shape.num_heads_kv;
  const std::int64_t most =
      is_ragged ? std::max<std::int64_t>(1, shape.seqlen_q - shape.batch + 1) : shape.seqlen_q;
  for (const ForwardCachedKey& key : keys) {
    if (most * sharing <= key.block_rows) return key;
  }
  return keys.back();
}

// Heads whose CTAs form a group. Where rounds are shared: the most of them that leave few
// multiprocessors without work, or those that leave the fewest.
int choose_heads_at_once(const ForwardCachedKey& key, int heads, int num_sms) {
  if (has_columns(key)) return ceil_div(heads, ceil_div(heads, num_sms));
  int best = 1, most = 0;
  for (int at_once = std::min(heads, num_sms); at_once > 0; --at_once) {
    if (heads % at_once != 0) continue;
    const int at_work = num_sms / at_once * at_once;
    if (at_work > most) {
      best = at_once;
      most = at_work;
    }
    if (20 * at_work >= 19 * num_sms) break;
  }
  return best;
}

}  // namespace

StatusOr<ForwardCachedPlan> plan_forward_cached(const Shape& shape, bool is_ragged, int page_size,
                                                const std::vector<ForwardCachedKey>& available,
                                                int num_sms) {
  JFA_CHECK_OK(check_shape(shape));
  if (num_sms < 1) return invalid_argument(concat("num_sms must be positive, got ", num_sms));
  if (page_size < 0 || page_size % kLeastBoxRows != 0) {
    return unimplemented(
        concat("page_size must be a multiple of ", kLeastBoxRows, ", got ", page_size));
  }
  const auto rows = checked_product(
      "query rows of all heads", {is_ragged ? 1 : shape.batch, shape.seqlen_q, shape.num_heads_q});
  if (!rows.ok()) return rows.status();
  JFA_CHECK_OK(check_most("query rows of all heads", rows.value(), kMostRows));
  JFA_CHECK_OK(check_most("batch", shape.batch, kMostSequences));
  const auto eligible = [&](const ForwardCachedKey& key) { return key.dtype == shape.dtype; };
  const auto keys = fitting_kernels(shape, available, eligible);
  if (keys.empty()) {
    return unimplemented(
        no_kernel_message("forward_cached", shape, compiled_head_dims(available, eligible)));
  }
  ForwardCachedPlan plan;
  plan.key = choose(shape, is_ragged, keys);
  plan.heads_at_once =
      choose_heads_at_once(plan.key, static_cast<int>(shape.num_heads_kv), num_sms);
  plan.groups = num_sms / plan.heads_at_once;
  plan.grid = plan.groups * plan.heads_at_once;
  const bool splits = plan.groups > 1;
  plan.workspace_bytes =
      splits ? 2 * plan.grid * partial_floats(plan.key) * std::int64_t(sizeof(float)) : 0;
  plan.num_counters = splits ? plan.grid * counters_of_cta(plan.key) : 0;
  return plan;
}

std::string to_string(const ForwardCachedPlan& plan) {
  return concat("forward_cached ", to_string(plan.key.dtype), " head_dim=", plan.key.head_dim, "/",
                plan.key.head_dim_v, " block_rows=", plan.key.block_rows,
                " heads_at_once=", plan.heads_at_once, " groups=", plan.groups, " grid=", plan.grid,
                " workspace_bytes=", plan.workspace_bytes, " counters=", plan.num_counters);
}

}  // namespace jax_fa3
