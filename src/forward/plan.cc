// Chooses the tile, and how tiles are handed out, by modelled makespan.
#include "forward/plan.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "attention/mask.h"
#include "base/shape.h"
#include "base/text.h"

namespace jax_fa3 {
namespace {

// Of K and V of a group of heads: what is tried, and how much longer the smallest may take.
constexpr std::int64_t kGroupBytes[] = {1 << 20, 4 << 20, 16 << 20, 64 << 20};
constexpr double kGroupSlack = 1.02;
constexpr int kWarpgroupRows = 64;
constexpr double kTileCycles = 4000;               // of a work tile outside its main loop
constexpr double kFlopsPerCycle = 4096;            // of one SM's tensor cores, 16-bit
constexpr std::int64_t kMaxWalkedTiles = 1 << 14;  // beyond, balance is perfect enough

// The share of tensor peak that a tile's main loop reaches when nothing but compute limits it: two
// consumer warpgroups hide less softmax than three, and at d64 the exponentials bind.
double main_loop_share(const ForwardKey& key) {
  const bool three_warpgroups = key.block_m >= 192;
  if (key.head_dim <= 64) return three_warpgroups ? 0.66 : 0.52;
  if (key.head_dim <= 128) return three_warpgroups ? 0.98 : 0.90;
  return 0.98;
}

double key_tile_cycles(const ForwardKey& key) {
  const double flops = 2.0 * key.block_m * key.block_n * (key.head_dim + key.head_dim_v);
  return flops / kFlopsPerCycle / main_loop_share(key);
}

struct Schedule {
  ForwardPlan plan;
  std::vector<double> cycles;  // [num_m_blocks] of a row block's work tile, at full lengths
};

// (batch, head) pairs whose K and V take `bytes`; query heads that share K and V stay together.
std::int32_t heads_per_group(const Shape& shape, std::int64_t bytes) {
  const std::int64_t kv_bytes = 2 * shape.seqlen_k * (shape.head_dim + shape.head_dim_v);
  const std::int64_t kv_heads = heads_in_l2(shape.batch * shape.num_heads_kv, kv_bytes, bytes);
  return static_cast<std::int32_t>(kv_heads * (shape.num_heads_q / shape.num_heads_kv));
}

StatusOr<Schedule> make_schedule(const Shape& shape, const MaskOptions& options,
                                 const ForwardKey& key, int num_sms) {
  Schedule schedule;
  ForwardPlan& plan = schedule.plan;
  plan.key = key;
  plan.num_m_blocks = ceil_div(static_cast<std::int32_t>(shape.seqlen_q), key.block_m);
  const auto num_tiles = count_tiles(shape.batch, shape.num_heads_q, plan.num_m_blocks);
  if (!num_tiles.ok()) return num_tiles.status();
  plan.num_tiles = num_tiles.value();
  plan.grid = static_cast<std::int32_t>(std::min<std::int64_t>(num_sms, plan.num_tiles));

  const int seqlen_q = static_cast<int>(shape.seqlen_q);
  const Mask mask =
      make_mask(options, IndexArrays{}, 0, seqlen_q, static_cast<int>(shape.seqlen_k));
  const double step = key_tile_cycles(key);
  schedule.cycles.reserve(plan.num_m_blocks);
  for (int row = 0; row < seqlen_q; row += key.block_m) {
    // A warpgroup's 64 rows pass over the key tiles that they do not see.
    double tiles = 0;
    for (int first = row; first < row + key.block_m; first += kWarpgroupRows) {
      const TileRange range = mask.key_tiles(first, first + kWarpgroupRows, key.block_n);
      tiles += range.end - range.begin;
    }
    schedule.cycles.push_back(kTileCycles + step * tiles * kWarpgroupRows / key.block_m);
  }
  // Deepest rows first pays when they are the longest; a window on both sides makes tiles equal.
  plan.longest_first = plan.num_m_blocks > 1 && options.window_right < kUnbounded &&
                       schedule.cycles.back() > schedule.cycles.front();
  plan.heads_per_group = 1;
  return schedule;
}

// Modelled cycles until the last CTA is done, tiles handed out as attention/scheduler.cuh does.
double makespan(const Schedule& schedule) {
  const ForwardPlan& plan = schedule.plan;
  if (plan.grid == 0) return 0;
  const std::int64_t num_heads = plan.num_tiles / plan.num_m_blocks;
  if (plan.num_tiles > kMaxWalkedTiles) {
    double total = 0;
    for (const double cycles : schedule.cycles) total += cycles * num_heads;
    return total / plan.grid;
  }
  const auto cycles_of = [&](std::int64_t tile) {
    const std::int64_t group = tile / (std::int64_t{plan.heads_per_group} * plan.num_m_blocks);
    const std::int64_t first = group * plan.heads_per_group;
    const std::int64_t heads = std::min<std::int64_t>(plan.heads_per_group, num_heads - first);
    const auto block = (tile - first * plan.num_m_blocks) / heads;
    return schedule.cycles[plan.longest_first ? plan.num_m_blocks - 1 - block : block];
  };
  std::vector<double> busy(plan.grid, 0.0);
  for (std::int64_t tile = 0; tile < plan.num_tiles; ++tile) {
    if (plan.longest_first) {  // the CTA that is free first takes the next tile
      std::pop_heap(busy.begin(), busy.end(), std::greater<>());
      busy.back() += cycles_of(tile);
      std::push_heap(busy.begin(), busy.end(), std::greater<>());
    } else {
      busy[tile % plan.grid] += cycles_of(tile);
    }
  }
  return *std::max_element(busy.begin(), busy.end());
}

// The schedule's makespan, with its groups of heads chosen. Large groups have the longest tiles of
// many heads first, which balances best; small ones read K and V from memory once, by CTAs that run
// side by side. The smallest that costs next to nothing.
double choose_groups(const Shape& shape, Schedule* schedule) {
  ForwardPlan& plan = schedule->plan;
  if (!plan.longest_first) return makespan(*schedule);
  std::vector<std::pair<std::int32_t, double>> tried;
  double best = std::numeric_limits<double>::infinity();
  for (const std::int64_t bytes : kGroupBytes) {
    plan.heads_per_group = heads_per_group(shape, bytes);
    tried.emplace_back(plan.heads_per_group, makespan(*schedule));
    best = std::min(best, tried.back().second);
  }
  for (const auto& [heads, cycles] : tried) {
    plan.heads_per_group = heads;
    if (cycles <= kGroupSlack * best) return cycles;
  }
  return best;
}

// The smallest compiled head dims of `shape.dtype` that hold the problem's; zeros when none do.
std::pair<int, int> choose_head_dims(const Shape& shape, const std::vector<ForwardKey>& available) {
  std::pair<int, int> best{0, 0};
  for (const ForwardKey& key : available) {
    if (key.dtype != shape.dtype) continue;
    if (key.head_dim < shape.head_dim || key.head_dim_v < shape.head_dim_v) continue;
    const std::pair<int, int> dims{key.head_dim, key.head_dim_v};
    if (best.first == 0 || dims < best) best = dims;
  }
  return best;
}

}  // namespace

StatusOr<ForwardPlan> plan_forward(const Shape& shape, const MaskOptions& mask,
                                   const std::vector<ForwardKey>& available, int num_sms) {
  JFA_CHECK_OK(check_shape(shape));
  JFA_CHECK_OK(check_mask(mask));
  if (num_sms < 1) return invalid_argument(concat("num_sms must be positive, got ", num_sms));
  const auto head_dims = choose_head_dims(shape, available);
  if (head_dims.first == 0) {
    return unimplemented(no_kernel_message("forward", shape, compiled_head_dims(shape, available)));
  }
  StatusOr<ForwardPlan> best = internal_error("forward: no plan");
  double best_cycles = std::numeric_limits<double>::infinity();
  for (const ForwardKey& key : available) {
    if (key.dtype != shape.dtype || key.head_dim != head_dims.first ||
        key.head_dim_v != head_dims.second) {
      continue;
    }
    if (!has_feature("192-rows") && key.block_m == 192) continue;
    const StatusOr<Schedule> made = make_schedule(shape, mask, key, num_sms);
    if (!made.ok()) return made.status();
    Schedule schedule = made.value();
    const double cycles = choose_groups(shape, &schedule);
    if (cycles < best_cycles) {
      best_cycles = cycles;
      best = schedule.plan;
    }
  }
  return best;
}

std::string to_string(const ForwardPlan& plan) {
  return concat("forward ", to_string(plan.key.dtype), " head_dim=", plan.key.head_dim, "/",
                plan.key.head_dim_v, " tile=", plan.key.block_m, "x", plan.key.block_n,
                " m_blocks=", plan.num_m_blocks, " heads_per_group=", plan.heads_per_group,
                " longest_first=", plan.longest_first, " tiles=", plan.num_tiles,
                " grid=", plan.grid);
}

}  // namespace jax_fa3
