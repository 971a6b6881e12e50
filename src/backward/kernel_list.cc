// The generated kernel lists of the backward pass.
#include "backward/dispatch.h"
#include "base/kernel_table.h"

namespace jax_fa3 {
namespace {

// clang-format off
constexpr auto kListed = keys_of<BackwardKey
#include "backward_listed.inc"
>();
constexpr auto kCompiled = keys_of<BackwardKey
#include "backward_compiled.inc"
>();
// clang-format on
static_assert(keys_are_unique(kListed), "two backward kernels claim the same key");

}  // namespace

const std::vector<BackwardKey>& listed_backward_kernels() {
  static const std::vector<BackwardKey> keys(kListed.begin(), kListed.end());
  return keys;
}

const std::vector<BackwardKey>& compiled_backward_kernels() {
  static const std::vector<BackwardKey> keys(kCompiled.begin(), kCompiled.end());
  return keys;
}

const std::vector<BackwardKey>& plannable_backward_kernels() {
  return kCompiled.empty() ? listed_backward_kernels() : compiled_backward_kernels();
}

}  // namespace jax_fa3
