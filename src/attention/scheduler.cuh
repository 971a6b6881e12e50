// Which CTA takes which work tile when: a static order, so that nothing has to be counted or
// reset in memory.
//
// A persistent CTA takes tile i * grid + cta in round i, every second round counted in reverse.
// When tiles differ in length they are ordered longest first within a group of heads whose
// operands fit L2 together, and the reversal pairs long with short.
#pragma once

#include <cute/config.hpp>

#include "base/types.h"

namespace jax_fa3 {

struct WorkTile {
  int block;  // of query rows in the forward pass, of keys in the backward pass
  int head;
  int batch;
};

struct StaticScheduler {
  int num_blocks;        // of one (batch, head)
  int num_heads;
  int num_batch_heads;   // batch * num_heads
  int heads_per_group;
  int num_tiles;
  bool last_block_first;

  // The CTA's tile of a round, or -1 after the last.
  CUTE_DEVICE int index(int round) const {
    const int cta = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const std::int64_t tile = std::int64_t(round) * gridDim.x + cta;
    return tile < num_tiles ? int(tile) : -1;
  }

  // Groups of heads outermost, then blocks, then the heads of the group.
  CUTE_DEVICE WorkTile tile(int index) const {
    const int group = index / (heads_per_group * num_blocks);
    const int first = group * heads_per_group;
    const int heads = min(heads_per_group, num_batch_heads - first);
    const int rest = index - first * num_blocks;
    const int block = rest / heads;
    const int batch_head = first + rest - block * heads;
    return {last_block_first ? num_blocks - 1 - block : block, batch_head % num_heads,
            batch_head / num_heads};
  }
};

}  // namespace jax_fa3
