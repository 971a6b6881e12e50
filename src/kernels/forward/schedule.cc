#include "kernels/forward/schedule.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "attention/mask.h"
#include "call/shape.h"

namespace jax_fa3 {
namespace {

constexpr int kWarpgroupRows = 64;
constexpr double kWarpgroupCycles = 1570;          // outside the main loop of a work tile
constexpr std::int64_t kMaxWalkedTiles = 1 << 14;  // beyond, balance is perfect enough

// What one warpgroup takes for a key tile with nobody to overlap with, of what all take together.
double lone_share(const TileModel& model) { return model.block_m >= 192 ? 0.7 : 0.8; }

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
    if (order.by_counter) {  // the CTA that is free first takes the next tile
      std::pop_heap(busy.begin(), busy.end(), std::greater<>());
      busy.back() += cycles_of(tile);
      std::push_heap(busy.begin(), busy.end(), std::greater<>());
    } else {
      const std::int64_t round = tile / order.grid;
      busy[(tile + (order.grid - 1) * round) % order.grid] += cycles_of(tile);
    }
  }
  return *std::max_element(busy.begin(), busy.end());
}

}  // namespace

StatusOr<Schedule> make_schedule(const Shape& shape, const MaskOptions& options,
                                 const IndexPresence& presence, const TileModel& model,
                                 int num_sms) {
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
    double tiles = 0, most = 0;
    for (int first = row; first < row + model.block_m; first += kWarpgroupRows) {
      const TileRange range = mask.key_tiles(first, first + kWarpgroupRows, model.block_n);
      tiles += range.end - range.begin;
      most = std::max<double>(most, range.end - range.begin);
    }
    const double warpgroups = model.block_m / kWarpgroupRows;
    cycles.push_back(kWarpgroupCycles * warpgroups +
                     model.key_tile_cycles *
                         std::max(tiles / warpgroups, most * lone_share(model)));
  }
  // Deepest rows first pays when they are the longest; a window on both sides makes tiles equal.
  // Row intervals and dense masks make them differ in ways that are not known here.
  const bool differ = presence.visibility || (is_listed(presence.variant) && presence.any);
  order.longest_first =
      order.num_m_blocks > 1 &&
      (differ || (options.window_right < kUnbounded && cycles.back() > cycles.front()));
  order.by_counter = order.longest_first || presence.any;
  order.heads_per_group = order.longest_first ? query_heads_per_group(shape) : 1;
  return Schedule{order, makespan(order, cycles)};
}

}  // namespace jax_fa3
