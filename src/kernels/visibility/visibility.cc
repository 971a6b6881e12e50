#include "kernels/visibility/visibility.h"

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
  const auto blocks =
      count_tiles(s.batch, s.num_heads_q, ceil_div<std::int64_t>(s.seqlen_k, kBoundsRows));
  return blocks.ok() ? Status() : blocks.status();
}

}  // namespace jax_fa3
