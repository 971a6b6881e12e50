// Chooses the tile by modelled makespan.
#include "kernels/forward_float8/plan.h"

#include <algorithm>
#include <limits>

#include "attention/prepare_value.h"
#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

constexpr double kFlopsPerCycle = 8192;  // of one SM's tensor cores, 8-bit

// The share of tensor peak that a tile's main loop reaches: from dense 16k at 1.7 GHz.
double main_loop_share(const ForwardFloat8Key& key) {
  if (key.head_dim <= 64) return 0.37;
  if (key.head_dim <= 96) return 0.42;
  if (key.head_dim <= 128) return 0.52;
  if (key.head_dim_v <= 128) return 0.59;
  if (key.head_dim <= 192) return 0.67;
  return 0.76;
}

TileModel model_of(const ForwardFloat8Key& key) {
  const double flops = 2.0 * key.block_m * key.block_n * (key.head_dim + key.head_dim_v);
  return {key.block_m, key.block_n, flops / kFlopsPerCycle / main_loop_share(key)};
}

Status check_head_dim(const char* name, std::int64_t value) {
  if (value % kFloat8HeadDimMultiple == 0) return {};
  return unimplemented(concat(name, " must be a multiple of ", kFloat8HeadDimMultiple,
                              " for float8 (rows of whole 16 bytes), got ", value));
}

}  // namespace

StatusOr<ForwardFloat8Plan> plan_forward_float8(const Shape& shape, const MaskOptions& mask,
                                                const IndexPresence& presence,
                                                bool value_is_prepared,
                                                const std::vector<ForwardFloat8Key>& available,
                                                int num_sms) {
  JFA_CHECK_OK(check_shape(shape));
  JFA_CHECK_OK(check_head_dim("head_dim", shape.head_dim));
  JFA_CHECK_OK(check_head_dim("head_dim_v", shape.head_dim_v));
  JFA_CHECK_OK(check_mask(mask));
  if (num_sms < 1) return invalid_argument(concat("num_sms must be positive, got ", num_sms));

  const auto keys = fitting_kernels(shape, available, [](const ForwardFloat8Key&) { return true; });
  if (keys.empty()) {
    std::vector<int> head_dims;
    for (const ForwardFloat8Key& key : available) head_dims.push_back(key.head_dim);
    std::sort(head_dims.begin(), head_dims.end());
    head_dims.erase(std::unique(head_dims.begin(), head_dims.end()), head_dims.end());
    return unimplemented(no_kernel_message("forward", "e4m3", shape, head_dims));
  }
  auto plan = choose_tile<ForwardFloat8Plan>(shape, mask, presence, keys, num_sms, model_of);
  if (!plan.ok() || value_is_prepared) return plan;

  ForwardFloat8Plan with_workspace = plan.value();
  const std::int64_t keys_padded = padded_keys(shape.seqlen_k);
  const auto bytes = checked_product(
      "float8 value workspace", {shape.batch, shape.num_heads_kv, shape.head_dim_v, keys_padded});
  if (!bytes.ok()) return bytes.status();
  with_workspace.workspace_bytes = bytes.value();
  with_workspace.transpose_blocks = prepare_blocks(shape);
  if (with_workspace.transpose_blocks > std::numeric_limits<std::int32_t>::max()) {
    return invalid_argument(concat("batch * heads * keys of value must be below 2^31 blocks, got ",
                                   with_workspace.transpose_blocks));
  }
  return with_workspace;
}

std::string to_string(const ForwardFloat8Plan& plan) {
  return concat("forward float8 head_dim=", plan.key.head_dim, "/", plan.key.head_dim_v,
                " tile=", plan.key.block_m, "x", plan.key.block_n, " m_blocks=", plan.num_m_blocks,
                " heads_per_group=", plan.heads_per_group, " longest_first=", plan.longest_first,
                " tiles=", plan.num_tiles, " grid=", plan.grid,
                " workspace_bytes=", plan.workspace_bytes);
}

}  // namespace jax_fa3
