// The generated kernel lists of the float8 forward pass.
#include "base/kernel_table.h"
#include "forward/dispatch.h"
#include "forward_float8/dispatch.h"

namespace jax_fa3 {
namespace {

// clang-format off
constexpr auto kListed = keys_of<ForwardFloat8Key
#include "forward_float8_listed.inc"
>();
constexpr auto kCompiled = keys_of<ForwardFloat8Key
#include "forward_float8_compiled.inc"
>();
// clang-format on
static_assert(keys_are_unique(kListed), "two float8 forward kernels claim the same key");

}  // namespace

const std::vector<ForwardFloat8Key>& listed_forward_float8_kernels() {
  static const std::vector<ForwardFloat8Key> keys(kListed.begin(), kListed.end());
  return keys;
}

const std::vector<ForwardFloat8Key>& compiled_forward_float8_kernels() {
  static const std::vector<ForwardFloat8Key> keys(kCompiled.begin(), kCompiled.end());
  return keys;
}

const std::vector<ForwardFloat8Key>& plannable_forward_float8_kernels() {
  const bool none_compiled = kCompiled.empty() && compiled_forward_kernels().empty();
  return none_compiled ? listed_forward_float8_kernels() : compiled_forward_float8_kernels();
}

}  // namespace jax_fa3
