// What plans and checks need to know of a GPU.
#pragma once

#include "call/status.h"

namespace jax_fa3 {

struct Device {
  int major;
  int minor;
  int num_sms;
};

// The calling thread's current device. Attributes are read once per device and kept.
StatusOr<Device> current_device();

}  // namespace jax_fa3
