// The table of compiled forward kernels: one row per Config, found by its key.
#include "forward/dispatch.h"

#include <array>

#include "forward/config.h"
#include "forward/launch.h"

namespace jax_fa3 {
namespace {

struct Row {
  ForwardKey key;
  Status (*launch)(const ForwardPlan&, const ForwardProblem&, cudaStream_t);
};

template <class RowType, class... Configs>
constexpr std::array<RowType, sizeof...(Configs)> table_of() {
  return {RowType{Configs::kKey, &launch_forward<Configs>}...};
}

// clang-format off
constexpr auto kTable = table_of<Row
#include "forward_compiled.inc"
>();
// clang-format on

}  // namespace

Status dispatch_forward(const ForwardPlan& plan, const ForwardProblem& problem,
                        CUstream_st* stream) {
  for (const Row& row : kTable) {
    if (row.key == plan.key) return row.launch(plan, problem, stream);
  }
  return internal_error("forward: no compiled kernel for " + to_string(plan));
}

}  // namespace jax_fa3
