// From a problem's extents to everything the launches of the backward pass need. Pure host code:
// no CUDA call, tested without a GPU.
#pragma once

#include <string>
#include <vector>

#include "call/problem.h"
#include "call/status.h"
#include "kernels/backward/config.h"
#include "kernels/backward_dq/plan.h"

namespace jax_fa3 {

// What is launched at a time; heads are counted through all batches.
struct BackwardChunk {
  std::int64_t first_head, num_heads;
};

struct BackwardPlan {
  BackwardKey key;
  std::int32_t num_m_blocks;     // steps along the queries of one (batch, head)
  std::int32_t num_n_blocks;     // work tiles along the keys of one (batch, kv head)
  std::int32_t heads_per_group;  // (batch, kv head) pairs whose operands are live in L2 at once
  std::int64_t num_heads;        // (batch, kv head) pairs
  std::int64_t num_chunks;       // parts of the call, one after another in the same workspace
  std::int64_t num_tiles;        // work tiles in all
  std::int32_t grid;             // persistent CTAs, of a chunk
  std::int32_t num_sms;          // multiprocessors to fill, of any launch

  DQueryPlan dquery;  // of the separate dQ kernel; no tiles if fused
  bool has_grid;      // fused, and shares of dQ are rounded so that their order does not matter

  // The workspace, in bytes from its start, each part 256-byte aligned. Of the largest chunk's
  // query heads, dQ and row statistics.
  std::int64_t dq_offset;             // fp32 dQ in the order of fragments; empty if separate
  std::int64_t statistics_offset;     // RowStatistics [heads, num_m_blocks * block_m]
  std::int64_t tile_counters_offset;  // int32 [2], of the main and the dQ kernel
  std::int64_t key_maxima_offset;     // KeyMaxima [b, h_kv, num_n_blocks]; empty without a grid
  std::int64_t workspace_bytes;

  // Chunks are whole groups, and differ by one group at most.
  BackwardChunk chunk(std::int64_t i) const;
};

// `available` is the list of kernels to choose from (KernelTable has the compiled ones). The
// workspace does not depend on num_sms: who asks for it may not know the device.
StatusOr<BackwardPlan> plan_backward(const Shape& shape, const MaskOptions& mask,
                                     const IndexPresence& presence, bool deterministic,
                                     const std::vector<BackwardKey>& available, int num_sms);

std::string to_string(const BackwardPlan& plan);

}  // namespace jax_fa3
