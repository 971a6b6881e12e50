// Chooses the tile by modelled makespan.
#include "kernels/forward/plan.h"

#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

constexpr double kFlopsPerCycle = 4096;  // of one SM's tensor cores, 16-bit

// The share of tensor peak that a tile's main loop reaches when nothing but compute limits it: two
// consumer warpgroups hide less softmax than three, and at d64 the exponentials bind.
double main_loop_share(const ForwardKey& key) {
  if (key.variant == Variant::kSoftcap || key.variant == Variant::kAlibi ||
      has_function(key.variant)) {
    constexpr double kOfPlain = 0.8;  // as measured at head_dim 128: vector work binds
    ForwardKey plain = key;
    plain.variant = Variant::kPlain;
    return kOfPlain * main_loop_share(plain);
  }
  const bool three_warpgroups = key.block_m >= 192;
  if (key.head_dim <= 64) return three_warpgroups ? 0.66 : 0.52;
  if (key.head_dim <= 128) return three_warpgroups ? 0.98 : 0.93;
  return three_warpgroups ? 0.98 : 0.94;
}

double key_tile_cycles(const ForwardKey& key) {
  const double flops = 2.0 * key.block_m * key.block_n * (key.head_dim + key.head_dim_v);
  return flops / kFlopsPerCycle / main_loop_share(key);
}

}  // namespace

StatusOr<ForwardPlan> plan_forward(const Shape& shape, const MaskOptions& mask,
                                   const IndexPresence& presence,
                                   const std::vector<ForwardKey>& available, int num_sms) {
  JFA_CHECK_OK(check_shape(shape));
  JFA_CHECK_OK(check_mask(mask));
  if (num_sms < 1) return invalid_argument(concat("num_sms must be positive, got ", num_sms));
  const auto eligible = [&](const ForwardKey& key) {
    return key.dtype == shape.dtype && key.variant == presence.variant;
  };
  const auto keys = fitting_kernels(shape, available, eligible);
  if (keys.empty()) {
    return unimplemented(no_kernel_message(
        "forward", shape, compiled_head_dims(available, eligible), presence.variant));
  }
  return choose_tile<ForwardPlan>(shape, mask, presence, keys, num_sms, [](const ForwardKey& key) {
    return TileModel{key.block_m, key.block_n, key_tile_cycles(key)};
  });
}

std::string to_string(const ForwardPlan& plan) {
  return concat("forward ", to_string(plan.key.dtype), " head_dim=", plan.key.head_dim, "/",
                plan.key.head_dim_v, " tile=", plan.key.block_m, "x", plan.key.block_n,
                " variant=", to_string(plan.key.variant), " m_blocks=", plan.num_m_blocks,
                " heads_per_group=", plan.heads_per_group, " longest_first=", plan.longest_first,
                " by_counter=", plan.by_counter, " tiles=", plan.num_tiles, " grid=", plan.grid);
}

}  // namespace jax_fa3
