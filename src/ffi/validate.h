// What protects memory: values, alignments, the workspace and the device. Python has checked the
// same with better words; this holds for calls that come another way.
#pragma once

#include "call/problem.h"
#include "call/status.h"
#include "ffi/device.h"
#include "kernels/quantize/quantize.h"

namespace jax_fa3 {

Status validate(const ForwardProblem& problem, const Device& device);
Status validate(const ForwardFloat8Problem& problem, const Device& device);
Status validate(const BackwardProblem& problem, const Device& device);
Status validate(const QuantizeProblem& problem, const Device& device);

// How many multiprocessors a launch may fill when it leaves `sm_margin` free: one at least.
StatusOr<int> num_sms_to_fill(const Device& device, std::int32_t sm_margin);

// The workspace must hold what the plan lays out in it.
Status validate_workspace(std::int64_t needed_bytes, std::int64_t workspace_bytes);

}  // namespace jax_fa3
