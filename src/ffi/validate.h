// What protects memory, beside what decode.h checks of each array and options.h of values: extents
// together, the workspace's size and the device. Python has checked the same with better words;
// this holds for calls that come another way.
#pragma once

#include "call/problem.h"
#include "call/status.h"
#include "ffi/device.h"

namespace jax_fa3 {

Status check_device(const Device& device);

// What every family asks of a call of attention.
Status check_extents(const CallProblem& problem);

// How many multiprocessors a launch may fill when it leaves `sm_margin` free: one at least.
StatusOr<int> num_sms_to_fill(const Device& device, std::int32_t sm_margin);

// The workspace must hold what the plan lays out in it.
Status check_workspace(std::int64_t needed_bytes, std::int64_t workspace_bytes);

}  // namespace jax_fa3
