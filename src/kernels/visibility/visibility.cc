#include "kernels/visibility/visibility.h"

#include <algorithm>

#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

Status check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return {};
  return invalid_argument(concat(name, " must be in [", low, ", ", high, "], got ", value));
}

}  // namespace

Status check_visibility(const VisibilityProblem& problem) {
  const Shape& s = problem.shape;
  JFA_CHECK_OK(check_range("seqlen_q", s.seqlen_q, 1, kMaxSeqlen));
  JFA_CHECK_OK(check_range("seqlen_k", s.seqlen_k, 1, kMaxSeqlen));
  JFA_CHECK_OK(check_range("attention_chunk", problem.chunk, 0, kMaxSeqlen));
  JFA_CHECK_OK(check_mask(problem.window));
  if (problem.query_ids != nullptr && problem.key_ids == nullptr && s.seqlen_q != s.seqlen_k) {
    return invalid_argument(concat("query_segment_ids without key_value_segment_ids must have one ",
                                   "id for each of ", s.seqlen_k, " keys, got ", s.seqlen_q));
  }
  if (problem.num_ends >= 0) {
    JFA_CHECK_OK(check_range("the number of cu_seqlens", problem.num_ends, 1, kMaxSeqlen));
  }
  const auto groups = ceil_div<std::int64_t>(std::max(s.seqlen_q, s.seqlen_k), kBoundsRows);
  const auto blocks = count_tiles(s.batch, s.num_heads_q, groups);
  return blocks.ok() ? Status() : blocks.status();
}

Chunks chunks_of(const Shape& shape) {
  const std::int64_t seqlen = std::max(shape.seqlen_q, shape.seqlen_k);
  std::int64_t rows = kChunkRows;
  while (ceil_div(seqlen, rows) > kMostChunks) rows *= 2;
  return {static_cast<int>(rows), static_cast<int>(ceil_div(seqlen, rows))};
}

std::int64_t visibility_workspace_bytes(const Shape& shape) {
  const std::int64_t planes = shape.batch * shape.num_heads_q;
  return planes * chunks_of(shape).count * static_cast<std::int64_t>(sizeof(ChunkSummary));
}

}  // namespace jax_fa3
