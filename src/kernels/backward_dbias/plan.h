// The extents of dBias and of what is added up in it, and how the work is divided. Pure host code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "call/problem.h"
#include "call/shape.h"

namespace jax_fa3 {

// A work tile's rows and keys.
constexpr int kDBiasBlockM = 128;
constexpr int dbias_block_n(int head_dim) { return head_dim <= 192 ? 128 : 64; }

// In blocks of a work tile.
struct BiasExtents {
  // Of a plane of the bias.
  int num_heads;   // 1, or those of query
  int row_blocks;  // 1 where rows share values
  int key_blocks;

  // Of what is added up in a tile, steps of one block each, the last factor innermost: all that
  // share its values.
  int shared_sequences;
  int shared_heads;
  int shared_row_blocks;
  bool shares_rows;

  JFA_HD int num_steps() const { return shared_sequences * shared_heads * shared_row_blocks; }
};

// Fails where numbers of tiles or of steps would not fit 32 bits.
inline Status make_bias_extents(BiasExtents* extents, const CallProblem& problem, int block_n) {
  const Shape& s = problem.shape;
  const Broadcast& bias = problem.dense.bias_shape;
  const auto row_blocks = static_cast<int>(ceil_div<std::int64_t>(s.seqlen_q, kDBiasBlockM));
  extents->num_heads = static_cast<int>(bias.heads);
  extents->row_blocks = bias.rows > 1 ? row_blocks : 1;
  extents->key_blocks = static_cast<int>(ceil_div<std::int64_t>(s.seqlen_k, block_n));
  extents->shared_sequences = static_cast<int>(s.batch / bias.sequences);
  extents->shared_heads = bias.heads > 1 ? 1 : static_cast<int>(s.num_heads_q);
  extents->shared_row_blocks = bias.rows > 1 ? 1 : row_blocks;
  extents->shares_rows = bias.rows <= 1;
  return count_tiles(s.batch, s.num_heads_q, row_blocks).status();
}

// Into how many slices the steps of a tile are divided, where tiles are fewer than CTAs or leave
// many of them without work in the last round. Slices are added up by a second kernel. At most
// `most`, for which there is memory. Times are in steps.
inline int choose_bias_slices(std::int64_t num_tiles, std::int64_t num_steps, std::int64_t num_sms,
                              std::int64_t most) {
  constexpr std::int64_t kMostSlices = 32;
  constexpr std::int64_t kStepsToEnd = 1;      // an item
  constexpr std::int64_t kStepsToCombine = 4;  // the second kernel
  int best = 1;
  std::int64_t best_steps = 0;
  for (int slices = 1; slices <= std::min({num_steps, most, kMostSlices}); ++slices) {
    const std::int64_t rounds = ceil_div(num_tiles * slices, num_sms);
    const std::int64_t steps = rounds * (ceil_div<std::int64_t>(num_steps, slices) + kStepsToEnd) +
                               (slices > 1 ? kStepsToCombine : 0);
    if (slices == 1 || steps < best_steps) {
      best = slices;
      best_steps = steps;
    }
  }
  return best;
}

}  // namespace jax_fa3
