#include "ffi/linked_kernels.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "call/text.h"

namespace jax_fa3 {
namespace {

constexpr std::size_t kKeyDigits = 64;
constexpr std::string_view kElf =
    "\x7f"
    "ELF";
constexpr std::size_t kElfHeaderBytes = 64;

struct Loaded {
  const void* kernel;
  std::size_t code_bytes;  // of the attribute
};

std::mutex mutex;
std::map<std::string, Loaded, std::less<>> loaded;

Status check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  return internal_error(concat(call, " failed: ", cudaGetErrorString(error)));
}

Status check_key(std::string_view key) {
  const auto is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (key.size() == kKeyDigits && std::all_of(key.begin(), key.end(), is_digit)) return {};
  return invalid_argument(concat("a kernel's key must have ", kKeyDigits,
                                 " hexadecimal digits, got ", key.size(), " characters"));
}

// Six bits of a digit of base64, or -1.
int value_of(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' ? 62 : c == '/' ? 63 : -1;
}

StatusOr<std::string> decode_base64(std::string_view text) {
  const Status malformed = invalid_argument("a kernel's code must be base64");
  if (text.size() % 4 != 0) return malformed;
  while (!text.empty() && text.back() == '=') text.remove_suffix(1);
  std::string bytes;
  bytes.reserve(text.size() / 4 * 3 + 2);
  std::uint32_t bits = 0;
  int num_bits = 0;
  for (const char c : text) {
    const int value = value_of(c);
    if (value < 0) return malformed;
    bits = bits << 6 | static_cast<std::uint32_t>(value);
    num_bits += 6;
    if (num_bits < 8) continue;
    num_bits -= 8;
    bytes.push_back(static_cast<char>(bits >> num_bits & 0xff));
  }
  return bytes;
}

bool has_gpu() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count > 0;
  cudaGetLastError();  // is not for whoever comes next
  return false;
}

StatusOr<const void*> load_library(const std::string& cubin) {
  cudaLibrary_t library{};
  JFA_CHECK_OK(
      check(cudaLibraryLoadData(&library, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
            "cudaLibraryLoadData of a linked kernel"));
  unsigned count = 0;
  cudaKernel_t kernel{};
  Status status = check(cudaLibraryGetKernelCount(&count, library), "cudaLibraryGetKernelCount");
  if (status.ok() && count != 1) {
    status = invalid_argument(concat("a kernel's code must have one kernel, got ", count));
  }
  if (status.ok()) {
    status = check(cudaLibraryEnumerateKernels(&kernel, 1, library), "cudaLibraryEnumerateKernels");
  }
  if (!status.ok()) {
    cudaLibraryUnload(library);
    return status;
  }
  return static_cast<const void*>(kernel);
}

}  // namespace

Status load(const LinkedKernel& kernel) {
  if (!kernel.is_there()) return {};
  JFA_CHECK_OK(check_key(kernel.key));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = loaded.find(kernel.key);
  if (found != loaded.end()) {
    if (found->second.code_bytes == kernel.code.size()) return {};
    return invalid_argument(concat("two kernels have the key ", kernel.key));
  }
  const StatusOr<std::string> cubin = decode_base64(kernel.code);
  if (!cubin.ok()) return cubin.status();
  const std::string_view bytes = cubin.value();
  if (bytes.size() < kElfHeaderBytes || bytes.substr(0, kElf.size()) != kElf) {
    return invalid_argument("a kernel's code must be a cubin, which is an ELF file");
  }
  if (!has_gpu()) return {};
  const StatusOr<const void*> handle = load_library(cubin.value());
  if (!handle.ok()) return handle.status();
  loaded.emplace(kernel.key, Loaded{handle.value(), kernel.code.size()});
  return {};
}

StatusOr<const void*> handle_of(std::string_view key) {
  if (key.empty()) return static_cast<const void*>(nullptr);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = loaded.find(key);
  if (found != loaded.end()) return found->second.kernel;
  return internal_error(concat("the kernel ", key, " has not been loaded"));
}

}  // namespace jax_fa3
