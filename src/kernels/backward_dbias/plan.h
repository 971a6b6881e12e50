// How the work of dBias is divided. Pure host and device arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "call/problem.h"
#include "call/shape.h"

namespace jax_fa3 {

// A work tile's rows and keys.
constexpr int kDBiasBlockM = 128;
constexpr int dbias_block_n(int head_dim) { return head_dim <= 192 ? 128 : 64; }

// A tile of the bias. Of a bias with one row for all, `row` is 0 and the tile has all rows.
struct BiasBlock {
  int row;
  int key;
  int head;   // of the bias: 0 where heads share values
  int plane;  // of the bias, which some sequences share
};

// The work, in items: a slice of what is added up in a tile. Items of one slice are next to each
// other, and of these the tiles of one plane, so that CTAs are at the same queries and keys at the
// same time, which L2 then has.
struct BiasWork {
  // Of the bias.
  int num_heads;   // of a plane: 1, or those of query
  int row_blocks;  // of a head: 1 where rows share values
  int key_blocks;
  int num_tiles;

  // What is added up in a tile, one block of rows in each step: all that share its values, the rows
  // innermost.
  int shared_sequences;
  int shared_heads;
  int shared_row_blocks;
  bool shares_rows;
  int num_steps;

  int num_slices;
  int slice_steps;  // of an item, but perhaps fewer in the last slice; at least 1

  JFA_HD int num_items() const { return num_tiles * num_slices; }

  JFA_HD BiasBlock tile(int item, int block_n) const {
    const int number = item % num_tiles, block = number / key_blocks, head = block / row_blocks;
    return {block % row_blocks * kDBiasBlockM, number % key_blocks * block_n, head % num_heads,
            head / num_heads};
  }
};

// The slices of a tile. More than one where tiles are fewer than CTAs, or leave many of them
// without work in the last round; a second kernel adds them up, from memory that holds `most`.
// Times are in steps.
inline int choose_bias_slices(std::int64_t num_tiles, std::int64_t num_steps, std::int64_t num_sms,
                              std::int64_t most) {
  constexpr std::int64_t kMostSlices = 32;
  constexpr std::int64_t kStepsToEnd = 1;      // an item
  constexpr std::int64_t kStepsToCombine = 4;  // the second kernel
  std::int64_t best = 1, best_steps = 0;
  for (std::int64_t slices = 1; slices <= std::min({num_steps, most, kMostSlices}); ++slices) {
    const std::int64_t rounds = ceil_div(num_tiles * slices, num_sms);
    const std::int64_t steps =
        rounds * (ceil_div(num_steps, slices) + kStepsToEnd) + (slices > 1 ? kStepsToCombine : 0);
    if (slices == 1 || steps < best_steps) {
      best = slices;
      best_steps = steps;
    }
  }
  return static_cast<int>(best);
}

// For a problem that has queries. `scratch_bytes` can hold float32 sums of items.
inline StatusOr<BiasWork> divide_dbias(const CallProblem& problem, int block_n, int num_sms,
                                       std::int64_t scratch_bytes) {
  const Shape& s = problem.shape;
  const Broadcast& bias = problem.dense.bias_shape;
  const std::int64_t row_blocks = ceil_div<std::int64_t>(s.seqlen_q, kDBiasBlockM);
  const std::int64_t key_blocks = ceil_div<std::int64_t>(s.seqlen_k, block_n);
  BiasWork work;
  work.shares_rows = bias.rows == 1;
  work.num_heads = static_cast<int>(bias.heads);
  work.row_blocks = work.shares_rows ? 1 : static_cast<int>(row_blocks);
  work.key_blocks = static_cast<int>(key_blocks);
  const auto tiles = count_tiles(bias.sequences, bias.heads, work.row_blocks * key_blocks);
  if (!tiles.ok()) return tiles.status();
  work.num_tiles = static_cast<int>(tiles.value());

  work.shared_sequences = static_cast<int>(s.batch / bias.sequences);
  work.shared_heads = bias.heads > 1 ? 1 : static_cast<int>(s.num_heads_q);
  work.shared_row_blocks = work.shares_rows ? static_cast<int>(row_blocks) : 1;
  const auto steps = count_tiles(work.shared_sequences, work.shared_heads, work.shared_row_blocks);
  if (!steps.ok()) return steps.status();
  work.num_steps = static_cast<int>(steps.value());

  const std::int64_t tile_bytes = std::int64_t{kDBiasBlockM} * block_n * sizeof(float);
  const std::int64_t all_tiles_bytes = std::max<std::int64_t>(tile_bytes * work.num_tiles, 1);
  const int slices =
      choose_bias_slices(work.num_tiles, work.num_steps, num_sms, scratch_bytes / all_tiles_bytes);
  // Of equal length, but for the last.
  work.slice_steps = ceil_div(work.num_steps, slices);
  work.num_slices = ceil_div(work.num_steps, work.slice_steps);
  return work;
}

}  // namespace jax_fa3
