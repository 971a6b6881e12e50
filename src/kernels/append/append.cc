#include "kernels/append/append.h"

#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

Status check_rotary(const AppendProblem& problem) {
  if (problem.cos == nullptr) return {};
  const std::int64_t width = 2 * problem.half_width;
  if (width % kRotaryMultiple != 0 || width > problem.shape.head_dim) {
    return unimplemented(concat("the rotary width must be a multiple of ", kRotaryMultiple,
                                " up to head_dim = ", problem.shape.head_dim, ", got ", width));
  }
  if (problem.positions > 0 && problem.positions <= kMaxSeqlen) return {};
  return invalid_argument(
      concat("cos must have 1 to ", kMaxSeqlen, " positions, got ", problem.positions));
}

}  // namespace

Status check_append(const AppendProblem& problem) {
  const Shape& s = problem.shape;
  JFA_CHECK_OK(check_shape(s));
  JFA_CHECK_OK(check_rotary(problem));
  // The kernel counts tokens, and the packets of one of them, in 32 bits.
  const auto tokens = count_tiles(s.batch, s.seqlen_q, 1);
  if (!tokens.ok()) return tokens.status();
  const auto elements =
      count_tiles(s.num_heads_q + 2 * s.num_heads_kv, kMaxHeadDim / kAppendPacket, 1);
  return elements.ok() ? Status() : elements.status();
}

}  // namespace jax_fa3
