#include "ffi/device.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "call/text.h"

namespace jax_fa3 {
namespace {

Status check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  return internal_error(concat(call, " failed: ", cudaGetErrorString(error)));
}

}  // namespace

StatusOr<Device> current_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;

  int ordinal = 0;
  JFA_CHECK_OK(check(cudaGetDevice(&ordinal), "cudaGetDevice"));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(ordinal);
  if (found != known.end()) return found->second;

  Device device{};
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    return check(cudaDeviceGetAttribute(value, attribute, ordinal), "cudaDeviceGetAttribute");
  };
  JFA_CHECK_OK(read(&device.major, cudaDevAttrComputeCapabilityMajor));
  JFA_CHECK_OK(read(&device.minor, cudaDevAttrComputeCapabilityMinor));
  JFA_CHECK_OK(read(&device.num_sms, cudaDevAttrMultiProcessorCount));
  known.emplace(ordinal, device);
  return device;
}

}  // namespace jax_fa3
