// What every attention kernel is launched with, beside its tensor maps and what is its own.
#pragma once

#include <type_traits>

#include "attention/mask.h"
#include "attention/score.h"
#include "call/problem.h"

namespace jax_fa3 {

// A kernel's parameters begin with their tensor maps, of which the kernel computes addresses; these
// come next.
struct CommonParams {
  MaskOptions mask;
  IndexArrays index;
  int seqlen_q;
  int seqlen_k;
  int num_heads;  // of query
  int heads_per_kv_head;
  float softmax_scale;
  float logit_scale;       // from a score (attention/score.h) to a logit
  float logit_scale_log2;  // the same of base 2
  ScoreParams score;

  // The query heads of a work tile, by its head.
  JFA_HD QueryHeads query_heads(int head) const { return {head, 1}; }
};

// A kernel's parameters, with a function in place of what else its scores are made of.
template <class Params>
struct WithFunction : Params {
  FunctionParams score;
};
template <Variant kVariant, class Params>
using ParamsOf =
    std::conditional_t<has_function(kVariant), WithFunction<Params>, Params>;  // of a kernel

inline CommonParams common_params(const CallProblem& problem) {
  const Shape& s = problem.shape;
  return {problem.mask,
          problem.index,
          static_cast<int>(s.seqlen_q),
          static_cast<int>(s.seqlen_k),
          static_cast<int>(s.num_heads_q),
          static_cast<int>(s.num_heads_q / s.num_heads_kv),
          problem.softmax_scale,
          logit_scale(problem),
          logit_scale(problem) * kLog2e,
          score_params(problem)};
}

}  // namespace jax_fa3
