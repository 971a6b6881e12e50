// In what order a forward kernel's work tiles are handed out, and a model of how long that takes.
// Pure host code, shared by the plans of all forward kernels.
#pragma once

#include <limits>
#include <vector>

#include "call/problem.h"
#include "call/status.h"

namespace jax_fa3 {

struct TileOrder {
  std::int32_t num_m_blocks;     // work tiles along the queries of one (batch, head)
  std::int32_t heads_per_group;  // (batch, head) pairs whose blocks go out together
  bool longest_first;            // deepest rows first
  bool by_counter;               // tiles differ in length: whoever is free takes the next one
  std::int64_t num_tiles;        // work tiles in all
  std::int32_t grid;             // persistent CTAs
};

// What the model knows of a kernel.
struct TileModel {
  int block_m;
  int block_n;
  double key_tile_cycles;  // of all block_m rows against one key tile
};

struct Schedule {
  TileOrder order;
  double makespan;  // modelled cycles until the last CTA is done
};

StatusOr<Schedule> make_schedule(const Shape& shape, const MaskOptions& mask,
                                 const IndexPresence& presence, const TileModel& model,
                                 int num_sms);

// The kernel of `keys` that is done first, as a Plan: a TileOrder and a key. Of row intervals the
// model knows nothing: then the one with the most rows that has two tiles for each multiprocessor,
// or else the one with the most tiles.
template <class Plan, class Key, class ModelOf>
StatusOr<Plan> choose_tile(const Shape& shape, const MaskOptions& mask,
                           const IndexPresence& presence, const std::vector<Key>& keys, int num_sms,
                           const ModelOf& model_of) {
  StatusOr<Plan> best = internal_error("no kernel to choose from");
  double best_cost = std::numeric_limits<double>::infinity();
  for (const Key& key : keys) {
    const StatusOr<Schedule> schedule =
        make_schedule(shape, mask, presence, model_of(key), num_sms);
    if (!schedule.ok()) return schedule.status();
    double cost = schedule.value().makespan;
    if (presence.visibility) {
      cost = schedule.value().order.num_tiles >= 2 * num_sms ? -key.block_m : key.block_m;
    }
    if (cost >= best_cost) continue;
    best_cost = cost;
    Plan plan{};
    static_cast<TileOrder&>(plan) = schedule.value().order;
    plan.key = key;
    best = plan;
  }
  return best;
}

}  // namespace jax_fa3
