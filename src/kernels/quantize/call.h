// The custom call that rounds 16-bit arrays to e4m3.
#pragma once

#include "ffi/handler.h"
#include "kernels/quantize/quantize.h"

namespace jax_fa3 {

struct QuantizeAttributes {
  Names operands;
  Names results;
  std::uint32_t seed;  // of the rotation
  bool back;           // to the arrays' own dtype and basis again
  bool prepare_value;
};

struct QuantizeCall : ArrayTable<QuantizeProblem> {
  static constexpr const char* kTarget = "jax_fa3_quantize";
  using Attributes = QuantizeAttributes;

  static Status check(const Attributes& a) {
    if (!a.back || !a.prepare_value) return {};
    return invalid_argument("prepare_value must be false with back, got true");
  }
  static Types types(const Attributes& a) {
    Types types;
    if (!a.back) types.output = Types::DataType::F8E4M3FN;
    types.descale_each_block = true;
    return types;
  }

  static Arrays<Problem> operands(const Attributes&) {
    return {
        array<&Problem::query>(operands::kQuery),
        array<&Problem::key>(operands::kKey),
        array<&Problem::value>(operands::kValue),
        array<&Problem::index, &IndexArrays::query_lengths>(operands::kQueryLengths),
        array<&Problem::index, &IndexArrays::key_lengths>(operands::kKeyLengths),
    };
  }
  static Arrays<Problem> results(const Attributes& a) {
    return {
        array<&Problem::query_out>(operands::kQueryOut),
        array<&Problem::key_out>(operands::kKeyOut),
        array<&Problem::value_out>(a.prepare_value ? operands::kPreparedValueOut
                                                   : operands::kValueOut),
        array<&Problem::query_descale>(operands::kQueryDescale),
        array<&Problem::key_descale>(operands::kKeyDescale),
        array<&Problem::value_descale>(operands::kValueDescale),
    };
  }
  static void fill(const Attributes& a, const Extents&, Problem& problem) {
    problem.seed = a.seed;
    problem.back = a.back;
    problem.prepare_value = a.prepare_value;
  }

  static Status validate(const Problem& problem) { return check_quantize(problem.shape); }

  // There is nothing to choose: grids follow from the extents, and fill what there is.
  struct Plan {};
  static int sm_margin(const Attributes&) { return 0; }
  static StatusOr<Plan> plan(const Problem&, int) { return Plan{}; }
  static Status launch(const Plan&, const Problem& problem, CUstream_st* stream) {
    JFA_CHECK_OK(launch_quantize_rows(problem, stream));
    return launch_quantize_value(problem, stream);
  }
};

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::QuantizeAttributes,
                                      xla::ffi::StructMember<jax_fa3::Names>("operands"),
                                      xla::ffi::StructMember<jax_fa3::Names>("results"),
                                      xla::ffi::StructMember<std::uint32_t>("seed"),
                                      xla::ffi::StructMember<bool>("back"),
                                      xla::ffi::StructMember<bool>("prepare_value"));
