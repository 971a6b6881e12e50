// The generated kernel lists of the forward pass.
#include "base/kernel_table.h"
#include "forward/dispatch.h"

namespace jax_fa3 {
namespace {

// clang-format off
constexpr auto kListed = keys_of<ForwardKey
#include "forward_listed.inc"
>();
constexpr auto kCompiled = keys_of<ForwardKey
#include "forward_compiled.inc"
>();
// clang-format on
static_assert(keys_are_unique(kListed), "two forward kernels claim the same key");

}  // namespace

const std::vector<ForwardKey>& listed_forward_kernels() {
  static const std::vector<ForwardKey> keys(kListed.begin(), kListed.end());
  return keys;
}

const std::vector<ForwardKey>& compiled_forward_kernels() {
  static const std::vector<ForwardKey> keys(kCompiled.begin(), kCompiled.end());
  return keys;
}

const std::vector<ForwardKey>& plannable_forward_kernels() {
  return kCompiled.empty() ? listed_forward_kernels() : compiled_forward_kernels();
}

}  // namespace jax_fa3
