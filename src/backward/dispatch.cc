// The table of compiled backward kernels: one row per Config, found by its key.
#include "backward/dispatch.h"

#include <array>

#include "backward/config.h"
#include "backward/launch.h"

namespace jax_fa3 {
namespace {

struct Row {
  BackwardKey key;
  Status (*launch)(const BackwardPlan&, const BackwardProblem&, cudaStream_t);
};

template <class RowType, class... Configs>
constexpr std::array<RowType, sizeof...(Configs)> table_of() {
  return {RowType{Configs::kKey, &launch_backward<Configs>}...};
}

// clang-format off
constexpr auto kTable = table_of<Row
#include "backward_compiled.inc"
>();
// clang-format on

}  // namespace

Status dispatch_backward(const BackwardPlan& plan, const BackwardProblem& problem,
                         CUstream_st* stream) {
  for (const Row& row : kTable) {
    if (row.key == plan.key) return row.launch(plan, problem, stream);
  }
  return internal_error("backward: no compiled kernel for " + to_string(plan));
}

}  // namespace jax_fa3
