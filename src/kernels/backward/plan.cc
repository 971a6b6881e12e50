// Chooses the kernel and lays out the workspace.
#include "kernels/backward/plan.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "attention/mask.h"
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
// Chunks of a call, the more the smaller the workspace. With eight a float32 dQ is a quarter of
// `out`, and less would save little.
constexpr std::int64_t kMostChunks = 8;
constexpr double kMostTimeOfChunks = 1.01;  // of one chunk's, as modelled, without their launches
// Steps of a chunk, beside which its three launches are little, and rounds of its CTAs, which drift
// apart until it ends.
constexpr std::int64_t kLeastStepsOfChunk = 1 << 16;
constexpr std::int64_t kLeastRoundsOfChunk = 3;
constexpr std::int64_t kSeenPart = 8;  // of the steps, one in so many, where arrays hide others
// Multiprocessors that chunks are made for on every device: who asks for the workspace does not
// know which one it will be.
constexpr int kSmsOfChunks = 132;
constexpr std::int64_t kMostWalkedTiles = 1 << 17;  // more end evenly enough

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

// Steps of each work tile of a (batch, kv head) pair. A static offset is left out: Python does not
// say it when it asks for the workspace.
std::vector<std::int64_t> count_steps(const BackwardPlan& plan, const Shape& shape,
                                      const MaskOptions& options) {
  const Mask mask = make_mask({options.window_left, options.window_right, 0}, IndexArrays{}, 0,
                              static_cast<int>(shape.seqlen_q), static_cast<int>(shape.seqlen_k));
  std::vector<std::int64_t> steps;
  steps.reserve(plan.num_n_blocks);
  for (int n = 0; n < plan.num_n_blocks; ++n) {
    const int key = n * plan.key.block_n;
    const TileRange queries = mask.query_tiles(key, key + plan.key.block_n, plan.key.block_m);
    steps.push_back(shape.num_heads_q / shape.num_heads_kv * (queries.end - queries.begin));
  }
  return steps;
}

// Steps until all chunks are done, one after the other, tiles handed out as attention/scheduler.cuh
// does.
std::int64_t makespan(const BackwardPlan& plan, const std::vector<std::int64_t>& steps) {
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < plan.num_chunks; ++i) {
    std::vector<std::int64_t> busy(kSmsOfChunks, 0);
    std::int64_t heads = 0;
    for (std::int64_t left = plan.chunk(i).num_heads; left > 0; left -= heads) {
      heads = std::min<std::int64_t>(left, plan.heads_per_group);
      for (std::int64_t tile = 0; tile < heads * plan.num_n_blocks; ++tile) {
        std::pop_heap(busy.begin(), busy.end(), std::greater<>());
        busy.back() += steps[tile / heads];
        std::push_heap(busy.begin(), busy.end(), std::greater<>());
      }
    }
    sum += *std::max_element(busy.begin(), busy.end());
  }
  return sum;
}

// As many chunks as cost next to nothing. `plan` has groups for kSmsOfChunks.
std::int64_t choose_num_chunks(BackwardPlan plan, const Shape& shape, const MaskOptions& mask,
                               const IndexPresence& presence) {
  const std::vector<std::int64_t> steps = count_steps(plan, shape, mask);
  const std::int64_t steps_of_head =
      std::accumulate(steps.begin(), steps.end(), std::int64_t{0}) / (presence.any ? kSeenPart : 1);
  const std::int64_t least_tiles =
      presence.any ? kTilesOfPackedGroup : kLeastRoundsOfChunk * kSmsOfChunks;
  const auto are_long = [&] {
    std::int64_t least_heads = plan.num_heads;
    for (std::int64_t i = 0; i < plan.num_chunks; ++i) {
      least_heads = std::min(least_heads, plan.chunk(i).num_heads);
    }
    return least_heads * plan.num_n_blocks >= least_tiles &&
           least_heads * steps_of_head >= kLeastStepsOfChunk;
  };
  // What their ends cost. Where arrays hide steps it is not known, and chunks are long instead.
  const bool is_modelled = !presence.any && plan.num_tiles <= kMostWalkedTiles;
  plan.num_chunks = 1;
  const double most_time = is_modelled ? kMostTimeOfChunks * makespan(plan, steps) : 0;
  const auto end_evenly = [&] { return !is_modelled || makespan(plan, steps) <= most_time; };
  const auto groups = ceil_div<std::int64_t>(plan.num_heads, plan.heads_per_group);
  for (plan.num_chunks = std::min(kMostChunks, groups); plan.num_chunks > 1; --plan.num_chunks) {
    if (are_long() && end_evenly()) return plan.num_chunks;
  }
  return 1;
}

bool can_have_grid(const Shape& shape, Variant variant) {
  return takes_grid(variant) && shape.seqlen_k >= kLeastKeysOfGrid &&
         shape.seqlen_k <= kMostKeysOfGrid;
}

}  // namespace

BackwardChunk BackwardPlan::chunk(std::int64_t i) const {
  const std::int64_t groups = ceil_div<std::int64_t>(num_heads, heads_per_group);
  const auto begin = [&](std::int64_t of) {
    return std::min(of * groups / num_chunks * heads_per_group, num_heads);
  };
  return {begin(i), begin(i + 1) - begin(i)};
}

StatusOr<BackwardPlan> plan_backward(const Shape& shape, const MaskOptions& mask,
                                     const IndexPresence& presence, bool deterministic,
                                     const std::vector<BackwardKey>& available, int num_sms) {
  JFA_CHECK_OK(check_shape(shape));
  JFA_CHECK_OK(check_mask(mask));
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
  const auto dq_tiles = count_tiles(shape.batch, shape.num_heads_q,
                                    ceil_div(static_cast<std::int32_t>(shape.seqlen_q),
                                             dquery_block_m(key.head_dim, key.variant)));
  if (!dq_tiles.ok()) return dq_tiles.status();
  plan.has_grid = deterministic && !key.separate_dq;
  plan.dquery.num_tiles = key.separate_dq ? dq_tiles.value() : 0;
  plan.dquery.grid =
      static_cast<std::int32_t>(std::min<std::int64_t>(plan.dquery.num_tiles, num_sms));
  plan.dquery.heads_per_group = query_heads_per_group(shape);

  const auto group_for = [&](int sms) {
    return choose_heads_per_group(shape, presence, plan.num_n_blocks, sms);
  };
  plan.num_heads = shape.batch * shape.num_heads_kv;
  plan.heads_per_group = group_for(kSmsOfChunks);
  plan.num_chunks = key.separate_dq ? 1 : choose_num_chunks(plan, shape, mask, presence);
  // Several chunks are of whole groups.
  if (plan.num_chunks == 1) plan.heads_per_group = group_for(num_sms);
  std::int64_t heads_of_chunk = 0;  // of the largest
  for (std::int64_t i = 0; i < plan.num_chunks; ++i) {
    heads_of_chunk = std::max(heads_of_chunk, plan.chunk(i).num_heads);
  }
  plan.grid = static_cast<std::int32_t>(
      std::min<std::int64_t>(heads_of_chunk * plan.num_n_blocks, num_sms));

  const std::int64_t query_heads = shape.num_heads_q / shape.num_heads_kv;  // of a kv head
  const std::int64_t m_blocks = plan.num_m_blocks;
  Workspace workspace;
  JFA_CHECK_OK(workspace.reserve(
      "dQ workspace",
      {heads_of_chunk, query_heads, key.separate_dq ? 0 : m_blocks, key.block_m, key.head_dim},
      sizeof(float), &plan.dq_offset));
  JFA_CHECK_OK(workspace.reserve("row statistics",
                                 {heads_of_chunk, query_heads, m_blocks, key.block_m},
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
                " chunks=", plan.num_chunks, " tiles=", plan.num_tiles, " grid=", plan.grid,
                " workspace=", plan.workspace_bytes);
}

}  // namespace jax_fa3
