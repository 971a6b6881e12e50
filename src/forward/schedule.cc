#include "forward/schedule.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "attention/mask.h"
#include "base/shape.h"

namespace jax_fa3 {
namespace {

// Of K and V of a group of heads: what is tried, and how much longer the smallest may take.
constexpr std::int64_t kGroupBytes[] = {1 << 20, 4 << 20, 16 << 20, 64 << 20};
constexpr double kGroupSlack = 1.02;
constexpr int kWarpgroupRows = 64;
constexpr double kTileCycles = 4000;               // of a work tile outside its main loop
constexpr std::int64_t kMaxWalkedTiles = 1 << 14;  // beyond, balance is perfect enough

// (batch, head) pairs whose K and V take `bytes`; query heads that share K and V stay together.
std::int32_t heads_per_group(const Shape& shape, int element_bytes, std::int64_t bytes) {
  const std::int64_t kv_bytes =
      element_bytes * shape.seqlen_k * (shape.head_dim + shape.head_dim_v);
  const std::int64_t kv_heads = heads_in_l2(shape.batch * shape.num_heads_kv, kv_bytes, bytes);
  return static_cast<std::int32_t>(kv_heads * (shape.num_heads_q / shape.num_heads_kv));
}

// Modelled cycles until the last CTA is done, tiles handed out as attention/scheduler.cuh does;
// cycles[block] is a row block's at full lengths.
double makespan(const TileOrder& order, const std::vector<double>& cycles) {
  if (order.grid == 0) return 0;
  const std::int64_t num_heads = order.num_tiles / order.num_m_blocks;
  if (order.num_tiles > kMaxWalkedTiles) {
    double total = 0;
    for (const double block_cycles : cycles) total += block_cycles * num_heads;
    return total / order.grid;
  }
  const auto cycles_of = [&](std::int64_t tile) {
    const std::int64_t group = tile / (std::int64_t{order.heads_per_group} * order.num_m_blocks);
    const std::int64_t first = group * order.heads_per_group;
    const std::int64_t heads = std::min<std::int64_t>(order.heads_per_group, num_heads - first);
    const auto block = (tile - first * order.num_m_blocks) / heads;
    return cycles[order.longest_first ? order.num_m_blocks - 1 - block : block];
  };
  std::vector<double> busy(order.grid, 0.0);
  for (std::int64_t tile = 0; tile < order.num_tiles; ++tile) {
    if (order.longest_first) {  // the CTA that is free first takes the next tile
      std::pop_heap(busy.begin(), busy.end(), std::greater<>());
      busy.back() += cycles_of(tile);
      std::push_heap(busy.begin(), busy.end(), std::greater<>());
    } else {
      busy[tile % order.grid] += cycles_of(tile);
    }
  }
  return *std::max_element(busy.begin(), busy.end());
}

// Chooses the order's groups of heads and returns the makespan. Large groups have the longest tiles
// of many heads first, which balances best; small ones read K and V from memory once, by CTAs that
// run side by side. The smallest that costs next to nothing; of one head where tiles are equal.
double choose_groups(const Shape& shape, int element_bytes, const std::vector<double>& cycles,
                     TileOrder* order) {
  order->heads_per_group = 1;
  if (!order->longest_first) return makespan(*order, cycles);
  std::vector<std::pair<std::int32_t, double>> tried;
  double best = std::numeric_limits<double>::infinity();
  for (const std::int64_t bytes : kGroupBytes) {
    order->heads_per_group = heads_per_group(shape, element_bytes, bytes);
    tried.emplace_back(order->heads_per_group, makespan(*order, cycles));
    best = std::min(best, tried.back().second);
  }
  const auto chosen = std::find_if(tried.begin(), tried.end(), [&](const auto& group) {
    return group.second <= kGroupSlack * best;
  });
  order->heads_per_group = chosen->first;
  return chosen->second;
}

}  // namespace

StatusOr<Schedule> make_schedule(const Shape& shape, const MaskOptions& options,
                                 const TileModel& model, int num_sms) {
  TileOrder order;
  order.num_m_blocks = ceil_div(static_cast<std::int32_t>(shape.seqlen_q), model.block_m);
  const auto num_tiles = count_tiles(shape.batch, shape.num_heads_q, order.num_m_blocks);
  if (!num_tiles.ok()) return num_tiles.status();
  order.num_tiles = num_tiles.value();
  order.grid = static_cast<std::int32_t>(std::min<std::int64_t>(num_sms, order.num_tiles));

  const int seqlen_q = static_cast<int>(shape.seqlen_q);
  const Mask mask =
      make_mask(options, IndexArrays{}, 0, seqlen_q, static_cast<int>(shape.seqlen_k));
  std::vector<double> cycles;
  cycles.reserve(order.num_m_blocks);
  for (int row = 0; row < seqlen_q; row += model.block_m) {
    // A warpgroup's 64 rows pass over the key tiles that they do not see.
    double tiles = 0;
    for (int first = row; first < row + model.block_m; first += kWarpgroupRows) {
      const TileRange range = mask.key_tiles(first, first + kWarpgroupRows, model.block_n);
      tiles += range.end - range.begin;
    }
    cycles.push_back(kTileCycles + model.key_tile_cycles * tiles * kWarpgroupRows / model.block_m);
  }
  // Deepest rows first pays when they are the longest; a window on both sides makes tiles equal.
  order.longest_first =
      order.num_m_blocks > 1 && options.window_right < kUnbounded && cycles.back() > cycles.front();
  const double makespan = choose_groups(shape, model.element_bytes, cycles, &order);
  return Schedule{order, makespan};
}

}  // namespace jax_fa3
