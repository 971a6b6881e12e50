#include "ffi/validate.h"

#include <algorithm>
#include <limits>

#include "attention/dense_mask.h"
#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

// The kernels count the words of a plane in 32 bits.
Status check_dense_mask(const CallProblem& problem) {
  if (problem.dense.mask == nullptr) return {};
  const int rows = static_cast<int>(problem.dense.mask_shape.rows);
  const auto words = DenseMaskLayout{rows, static_cast<int>(problem.shape.seqlen_k)}.words();
  if (words <= std::numeric_limits<std::int32_t>::max()) return {};
  return invalid_argument(
      concat("dense_mask must have less than 2^31 words for each sequence and head, got ", words));
}

}  // namespace

Status check_device(const Device& device) {
  if (device.major == 9 && device.minor == 0) return {};
  return unimplemented(concat("needs a GPU of compute capability 9.0 (H100, H200), got ",
                              device.major, ".", device.minor));
}

Status check_extents(const CallProblem& problem) {
  JFA_CHECK_OK(check_shape(problem.shape));
  return check_dense_mask(problem);
}

StatusOr<int> num_sms_to_fill(const Device& device, std::int32_t sm_margin) {
  if (sm_margin < 0) {
    return invalid_argument(concat("sm_margin must be non-negative, got ", sm_margin));
  }
  return std::max(1, device.num_sms - sm_margin);
}

Status check_workspace(std::int64_t needed_bytes, std::int64_t workspace_bytes) {
  if (workspace_bytes >= needed_bytes) return {};
  return invalid_argument(
      concat("workspace must have ", needed_bytes, " bytes, got ", workspace_bytes));
}

}  // namespace jax_fa3
