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
  bool longest_first;            // tiles differ in length: deepest rows first, from a counter
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
                                 const TileModel& model, int num_sms);

// The kernel of `keys` that is done first, as a Plan: a TileOrder and a key.
template <class Plan, class Key, class ModelOf>
StatusOr<Plan> choose_tile(const Shape& shape, const MaskOptions& mask,
                           const std::vector<Key>& keys, int num_sms, const ModelOf& model_of) {
  StatusOr<Plan> best = internal_error("no kernel to choose from");
  double best_makespan = std::numeric_limits<double>::infinity();
  for (const Key& key : keys) {
    const StatusOr<Schedule> schedule = make_schedule(shape, mask, model_of(key), num_sms);
    if (!schedule.ok()) return schedule.status();
    if (schedule.value().makespan >= best_makespan) continue;
    best_makespan = schedule.value().makespan;
    Plan plan{};
    static_cast<TileOrder&>(plan) = schedule.value().order;
    plan.key = key;
    best = plan;
  }
  return best;
}

}  // namespace jax_fa3
