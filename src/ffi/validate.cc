#include "ffi/validate.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

constexpr std::uintptr_t kTmaAlignment = 16;         // bytes, of a tensor TMA reads or writes
constexpr std::uintptr_t kPacketAlignment = 16;      // bytes, of a tensor read by wide loads
constexpr std::uintptr_t kWorkspaceAlignment = 256;  // bytes
constexpr std::uintptr_t kWordAlignment = 4;         // bytes, of fp32 and int32 arrays

struct Pointer {
  const char* name;
  const void* address;
};

Status check_aligned(std::uintptr_t alignment, std::initializer_list<Pointer> pointers) {
  for (const Pointer& pointer : pointers) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer.address);
    if (address % alignment != 0) {
      return invalid_argument(concat(pointer.name, " must be aligned to ", alignment,
                                     " bytes, got address ", pointer.address));
    }
  }
  return {};
}

Status check_device(const Device& device) {
  if (device.major == 9 && device.minor == 0) return {};
  return unimplemented(concat("needs a GPU of compute capability 9.0 (H100, H200), got ",
                              device.major, ".", device.minor));
}

template <class Problem>
Status check_common(const Problem& problem, const Device& device) {
  JFA_CHECK_OK(check_device(device));
  JFA_CHECK_OK(check_shape(problem.shape));
  JFA_CHECK_OK(check_mask(problem.mask));
  if (!(problem.softmax_scale > 0) || !std::isfinite(problem.softmax_scale)) {
    return invalid_argument(
        concat("scale must be positive and finite, got ", problem.softmax_scale));
  }
  JFA_CHECK_OK(check_aligned(kWordAlignment, {{"lse", problem.lse},
                                              {"query_seq_lengths", problem.index.query_lengths},
                                              {"key_value_seq_lengths", problem.index.key_lengths},
                                              {"query_offset", problem.index.query_offset}}));
  return check_aligned(kTmaAlignment, {{"query", problem.query},
                                       {"key", problem.key},
                                       {"value", problem.value},
                                       {"out", problem.out}});
}

}  // namespace

Status validate(const ForwardProblem& problem, const Device& device) {
  JFA_CHECK_OK(check_common(problem, device));
  if (problem.rescale_threshold >= 0 && std::isfinite(problem.rescale_threshold)) return {};
  return invalid_argument(
      concat("rescale_threshold must be non-negative and finite, got ", problem.rescale_threshold));
}

Status validate(const ForwardFloat8Problem& problem, const Device& device) {
  JFA_CHECK_OK(check_common(problem, device));
  JFA_CHECK_OK(check_aligned(kWordAlignment, {{"query_descale", problem.query_descale},
                                              {"key_descale", problem.key_descale},
                                              {"value_descale", problem.value_descale}}));
  return check_aligned(kTmaAlignment, {{"workspace", problem.workspace}});
}

Status validate(const BackwardProblem& problem, const Device& device) {
  JFA_CHECK_OK(check_common(problem, device));
  JFA_CHECK_OK(check_aligned(kWordAlignment, {{"dlse", problem.dlse}}));
  JFA_CHECK_OK(check_aligned(kTmaAlignment, {{"dout", problem.dout},
                                             {"dquery", problem.dquery},
                                             {"dkey", problem.dkey},
                                             {"dvalue", problem.dvalue}}));
  return check_aligned(kWorkspaceAlignment, {{"workspace", problem.workspace}});
}

Status validate(const QuantizeProblem& problem, const Device& device) {
  JFA_CHECK_OK(check_device(device));
  JFA_CHECK_OK(
      check_aligned(kWordAlignment, {{"query_descale", problem.query_descale},
                                     {"key_descale", problem.key_descale},
                                     {"value_descale", problem.value_descale},
                                     {"query_seq_lengths", problem.index.query_lengths},
                                     {"key_value_seq_lengths", problem.index.key_lengths}}));
  return check_aligned(kPacketAlignment, {{"query", problem.query},
                                          {"key", problem.key},
                                          {"value", problem.value},
                                          {"query_out", problem.query_out},
                                          {"key_out", problem.key_out},
                                          {"value_out", problem.value_out}});
}

StatusOr<int> num_sms_to_fill(const Device& device, std::int32_t sm_margin) {
  if (sm_margin < 0) {
    return invalid_argument(concat("sm_margin must be non-negative, got ", sm_margin));
  }
  return std::max(1, device.num_sms - sm_margin);
}

Status validate_workspace(std::int64_t needed_bytes, std::int64_t workspace_bytes) {
  if (workspace_bytes >= needed_bytes) return {};
  return invalid_argument(
      concat("workspace must have ", needed_bytes, " bytes, got ", workspace_bytes));
}

}  // namespace jax_fa3
