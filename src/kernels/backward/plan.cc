// Chooses the kernel and lays out the workspace.
#include "kernels/backward/plan.h"

#include <algorithm>

#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

constexpr std::int64_t kRoundsOfGroup = 2;
constexpr std::int64_t kMostHeadsOfGroup = 16;
constexpr std::int64_t kTilesOfPackedGroup = 2048;
constexpr std::int64_t kPartAlignment = 256;   // bytes
constexpr std::int64_t kStatisticsBytes = 16;  // of a query row
constexpr std::int64_t kKeyMaximaBytes = 8;
// Keys of a deterministic call whose dQ is fused. Of fewer, a separate dQ is as fast; of more, the
// rounding of its shares would show.
constexpr std::int64_t kLeastKeysOfGrid = 1024;
constexpr std::int64_t kMostKeysOfGrid = 16384;

// Parts of the workspace one after the other, each aligned.
class Workspace {
 public:
  // Reserves a part and writes its offset.
  Status reserve(const char* what, std::initializer_list<std::int64_t> extents,
                 std::int64_t element_bytes, std::int64_t* offset) {
    *offset = bytes_;
    const auto elements = checked_product(what, extents);
    if (!elements.ok()) return elements.status();
    std::int64_t part = 0;
    if (__builtin_mul_overflow(elements.value(), element_bytes, &part) ||
        __builtin_add_overflow(part, kPartAlignment - 1, &part) ||
        __builtin_add_overflow(bytes_, part / kPartAlignment * kPartAlignment, &bytes_)) {
      return invalid_argument(concat(what, " exceeds 64-bit arithmetic"));
    }
    return {};
  }

  std::int64_t bytes() const { return bytes_; }

 private:
  std::int64_t bytes_ = 0;
};

// (batch, kv head) pairs in a group: as many as have two tiles for each CTA. The second tile of a
// CTA then belongs to the second half of a head's, and QueryWalk keeps the CTAs together. With row
// intervals CTAs are at the same queries if they have the same keys, so more heads, which also
// hands out the long tiles of a document early and leaves short ones for the end. Fewer of a long
// sequence: in a long document, CTAs drift apart, and L2 must hold what lies between them, of every
// head.
std::int32_t choose_heads_per_group(const Shape& shape, const IndexPresence& presence,
                                    std::int64_t num_n_blocks, int num_sms) {
  const std::int64_t blocks = std::max<std::int64_t>(num_n_blocks, 1);
  if (presence.visibility) {
    const std::int64_t fitting = std::max<std::int64_t>(kTilesOfPackedGroup / blocks, 1);
    return static_cast<std::int32_t>(std::min({shape.num_heads_kv, kMostHeadsOfGroup, fitting}));
  }
  const std::int64_t heads = std::max<std::int64_t>(shape.batch * shape.num_heads_kv, 1);
  const std::int64_t wanted = std::max<std::int64_t>(kRoundsOfGroup * num_sms / blocks, 1);
  // Groups of equal size, as far as possible.
  return static_cast<std::int32_t>(ceil_div(heads, ceil_div(heads, std::min(wanted, heads))));
}

bool can_have_grid(const Shape& shape, Variant variant) {
  return takes_grid(variant) && shape.seqlen_k >= kLeastKeysOfGrid &&
         shape.seqlen_k <= kMostKeysOfGrid;
}

}  // namespace

StatusOr<BackwardPlan> plan_backward(const Shape& shape, const IndexPresence& presence,
                                     bool deterministic, const std::vector<BackwardKey>& available,
                                     int num_sms) {
  JFA_CHECK_OK(check_shape(shape));
  if (num_sms < 1) return invalid_argument(concat("num_sms must be positive, got ", num_sms));
  const auto eligible = [&](const BackwardKey& key) {
    // Those for a bias make dQ by itself, and do so for masks where there is no other kernel.
    const bool takes = key.variant == presence.variant ||
                       (presence.variant == Variant::kMask && key.variant == Variant::kBias);
    return key.dtype == shape.dtype && takes &&
           (key.separate_dq || !deterministic || can_have_grid(shape, key.variant));
  };
  const auto keys = fitting_kernels(shape, available, eligible);
  if (keys.empty()) {
    return unimplemented(no_kernel_message(
        "backward", shape, compiled_head_dims(available, eligible), presence.variant));
  }
  const BackwardKey& key = keys.front();
  BackwardPlan plan;
  plan.key = key;
  plan.num_sms = num_sms;
  plan.num_m_blocks = ceil_div(static_cast<std::int32_t>(shape.seqlen_q), key.block_m);
  plan.num_n_blocks = ceil_div(static_cast<std::int32_t>(shape.seqlen_k), key.block_n);
  const auto num_tiles = count_tiles(shape.batch, shape.num_heads_kv, plan.num_n_blocks);
  if (!num_tiles.ok()) return num_tiles.status();
  plan.num_tiles = num_tiles.value();
  plan.grid = static_cast<std::int32_t>(std::min<std::int64_t>(plan.num_tiles, num_sms));
  plan.heads_per_group = choose_heads_per_group(shape, presence, plan.num_n_blocks, num_sms);

  const auto dq_tiles = count_tiles(shape.batch, shape.num_heads_q,
                                    ceil_div(static_cast<std::int32_t>(shape.seqlen_q),
                                             dquery_block_m(key.head_dim, key.variant)));
  if (!dq_tiles.ok()) return dq_tiles.status();
  plan.has_grid = deterministic && !key.separate_dq;
  plan.dquery.num_tiles = key.separate_dq ? dq_tiles.value() : 0;
  plan.dquery.grid =
      static_cast<std::int32_t>(std::min<std::int64_t>(plan.dquery.num_tiles, num_sms));
  plan.dquery.heads_per_group = query_heads_per_group(shape);

  const std::int64_t heads = shape.num_heads_q;
  const std::int64_t m_blocks = plan.num_m_blocks;
  Workspace workspace;
  JFA_CHECK_OK(workspace.reserve(
      "dQ workspace",
      {shape.batch, heads, key.separate_dq ? 0 : m_blocks, key.block_m, key.head_dim},
      sizeof(float), &plan.dq_offset));
  JFA_CHECK_OK(workspace.reserve("row statistics", {shape.batch, heads, m_blocks, key.block_m},
                                 kStatisticsBytes, &plan.statistics_offset));
  JFA_CHECK_OK(
      workspace.reserve("tile counters", {2}, sizeof(std::int32_t), &plan.tile_counters_offset));
  JFA_CHECK_OK(
      workspace.reserve("largest keys and values",
                        {shape.batch, shape.num_heads_kv, plan.has_grid ? plan.num_n_blocks : 0},
                        kKeyMaximaBytes, &plan.key_maxima_offset));
  plan.workspace_bytes = workspace.bytes();
  return plan;
}

std::string to_string(const BackwardPlan& plan) {
  return concat("backward ", to_string(plan.key.dtype), " head_dim=", plan.key.head_dim, "/",
                plan.key.head_dim_v, " tile=", plan.key.block_m, "x", plan.key.block_n,
                plan.key.separate_dq ? " separate dQ"
                : plan.has_grid      ? " dQ on a grid"
                                     : "",
                " variant=", to_string(plan.key.variant), " m_blocks=", plan.num_m_blocks,
                " n_blocks=", plan.num_n_blocks, " heads_per_group=", plan.heads_per_group,
                " tiles=", plan.num_tiles, " grid=", plan.grid,
                " workspace=", plan.workspace_bytes);
}

}  // namespace jax_fa3
