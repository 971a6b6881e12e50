// What scores are made of, and their units: exponentials are of base 2, LSE and the caller's scale
// are natural.
#pragma once

#include "call/problem.h"

namespace jax_fa3 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// HeadValues, as kernels read them.
struct HeadTable {
  const float* values;
  int num_heads;
  int sequences;  // consecutive ones that share a plane

#if defined(__CUDACC__)
  __device__ float of(int batch, int head) const {
    return __ldg(values + std::int64_t{batch / sequences} * num_heads + head);
  }
#endif
};

inline HeadTable head_table(const HeadValues& values, const Shape& shape) {
  return {values.values, static_cast<int>(shape.num_heads_q),
          static_cast<int>(shape.batch / (values.planes > 0 ? values.planes : 1))};
}

// What a kernel's Score (attention/score.cuh) makes of a product q . k. Multiplied by the
// logit_scale, the result is the logit.
struct ScoreParams {
  float factor;      // Softcap: scale / softcap. Alibi: -1 / scale
  HeadTable slopes;  // Alibi
};

// The same of a kernel whose Score is a function, which gives logits.
struct FunctionParams {
  float scale;
  float unit;                         // of products, 1 / scale
  const std::int32_t* batch_numbers;  // [b], as the function counts them
  const std::int32_t* head_numbers;   // [h_q]
  JfaCaptured captured;
};

inline float logit_scale(const CallProblem& problem) {
  if (has_function(problem.presence.variant)) return 1.f;
  return problem.softcap > 0 ? problem.softcap : problem.softmax_scale;
}

inline FunctionParams function_params(const CallProblem& problem) {
  const FunctionArrays& function = problem.function;
  const float scale = problem.softmax_scale;
  return {scale, 1.f / scale, function.batch_numbers, function.head_numbers, function.captured};
}

inline ScoreParams score_params(const CallProblem& problem) {
  const float scale = problem.softmax_scale;
  return {problem.softcap > 0 ? scale / problem.softcap : -1.f / scale,
          head_table(problem.alibi_slopes, problem.shape)};
}

}  // namespace jax_fa3
