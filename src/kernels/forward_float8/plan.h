// From a problem's extents to everything a float8 forward launch needs. Pure host code.
#pragma once

#include <string>
#include <vector>

#include "call/problem.h"
#include "call/status.h"
#include "kernels/forward/schedule.h"
#include "kernels/forward_float8/config.h"

namespace jax_fa3 {

constexpr std::int64_t kFloat8HeadDimMultiple = 16;  // 16 bytes, the granularity of TMA

struct ForwardFloat8Plan : TileOrder {
  ForwardFloat8Key key;
  std::int64_t workspace_bytes;   // of value in the prepared layout, if it is not prepared
  std::int64_t transpose_blocks;  // CTAs that prepare it
};

// `available` is the list of kernels to choose from.
StatusOr<ForwardFloat8Plan> plan_forward_float8(const Shape& shape, const MaskOptions& mask,
                                                const IndexPresence& presence,
                                                bool value_is_prepared,
                                                const std::vector<ForwardFloat8Key>& available,
                                                int num_sms);

std::string to_string(const ForwardFloat8Plan& plan);

}  // namespace jax_fa3
