// The custom call that makes the table of a dense mask.
#pragma once

#include "ffi/handler.h"
#include "kernels/dense_mask/dense_mask.h"

namespace jax_fa3 {

// The arrays say all there is.
struct DenseMaskAttributes {
  Names operands;
  Names results;
};

struct DenseMaskCall : ArrayTable<DenseMaskProblem> {
  static constexpr const char* kTarget = "jax_fa3_dense_mask";
  using Attributes = DenseMaskAttributes;

  static Status check(const Attributes&) { return {}; }
  static Types types(const Attributes&) { return {}; }

  static Arrays<Problem> operands(const Attributes&) {
    return {array<&Problem::mask>(operands::kMask, kMaskAlignment)};
  }
  static Arrays<Problem> results(const Attributes&) {
    return {array<&Problem::table>(operands::kMaskTable)};
  }
  static void fill(const Attributes&, const Extents& extents, Problem& problem) {
    problem.words = extents['u'];
  }

  static Status validate(const Problem& problem) { return check_dense_mask(problem); }

  // There is nothing to choose.
  struct Plan {};
  static int sm_margin(const Attributes&) { return 0; }
  static StatusOr<Plan> plan(const Problem&, int) { return Plan{}; }
  static Status launch(const Plan&, const Problem& problem, CUstream_st* stream) {
    return launch_dense_mask(problem, stream);
  }

 private:
  static constexpr std::uintptr_t kMaskAlignment = 16;  // bytes, that a thread loads at a time
};

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::DenseMaskAttributes,
                                      xla::ffi::StructMember<jax_fa3::Names>("operands"),
                                      xla::ffi::StructMember<jax_fa3::Names>("results"));
