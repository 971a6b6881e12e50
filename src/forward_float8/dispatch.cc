// The table of compiled float8 forward kernels: one row per Config, found by its key.
#include "forward_float8/dispatch.h"

#include <array>

#include "forward_float8/config.h"
#include "forward_float8/launch.h"

namespace jax_fa3 {
namespace {

struct Row {
  ForwardFloat8Key key;
  Status (*launch)(const ForwardFloat8Plan&, const ForwardFloat8Problem&, cudaStream_t);
};

template <class RowType, class... Configs>
constexpr std::array<RowType, sizeof...(Configs)> table_of() {
  return {RowType{Configs::kKey, &launch_forward_float8<Configs>}...};
}

// clang-format off
constexpr auto kTable = table_of<Row
#include "forward_float8_compiled.inc"
>();
// clang-format on

}  // namespace

Status dispatch_forward_float8(const ForwardFloat8Plan& plan, const ForwardFloat8Problem& problem,
                               CUstream_st* stream) {
  for (const Row& row : kTable) {
    if (row.key == plan.key) return row.launch(plan, problem, stream);
  }
  return internal_error("forward_float8: no compiled kernel for " + to_string(plan));
}

}  // namespace jax_fa3
