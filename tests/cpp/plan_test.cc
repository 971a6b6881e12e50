// Planning: which tile, in which order, how much workspace, and what is refused.
#include "kernels/backward/plan.h"

#include <algorithm>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "kernels/backward_dbias/plan.h"
#include "kernels/forward/plan.h"
#include "kernels/forward_cached/plan.h"
#include "kernels/forward_float8/plan.h"

namespace jax_fa3 {
namespace {

constexpr int kSms = 132;
constexpr MaskOptions kFull{};
constexpr MaskOptions kCausal{kUnbounded, 0, 0};

constexpr Variant kNone = Variant::kPlain, kMask = Variant::kMask, kBias = Variant::kBias;

const std::vector<ForwardKey> kForward = {
    {DType::kBF16, 64, 64, 192, 128, kNone},   {DType::kBF16, 64, 64, 128, 128, kNone},
    {DType::kBF16, 96, 96, 192, 96, kNone},    {DType::kBF16, 128, 128, 192, 80, kNone},
    {DType::kBF16, 128, 128, 128, 128, kNone}, {DType::kBF16, 128, 128, 192, 80, kMask},
    {DType::kBF16, 32, 32, 192, 128, kBias},   {DType::kBF16, 128, 128, 128, 96, kBias}};

const std::vector<BackwardKey> kBackward = {
    {DType::kBF16, 64, 64, 128, 128, false, kNone},  {DType::kBF16, 64, 64, 128, 128, true, kNone},
    {DType::kBF16, 128, 128, 64, 128, false, kNone}, {DType::kBF16, 128, 128, 64, 128, true, kNone},
    {DType::kBF16, 128, 128, 64, 128, false, kMask}, {DType::kBF16, 32, 32, 128, 128, true, kBias},
    {DType::kBF16, 128, 128, 64, 128, true, kBias}};

Shape shape(std::int64_t batch, std::int64_t seqlen, std::int64_t heads, std::int64_t head_dim) {
  return {DType::kBF16, batch, seqlen, seqlen, heads, heads, head_dim, head_dim};
}

ForwardPlan forward(const Shape& s, const MaskOptions& mask = kFull, int num_sms = kSms) {
  const auto plan = plan_forward(s, mask, {}, kForward, num_sms);
  CHECK_DETAIL(plan.ok(), plan.status().message());
  return plan.value();
}

BackwardPlan backward(const Shape& s, bool deterministic = false, const MaskOptions& mask = kFull,
                      const IndexPresence& presence = {}, int num_sms = kSms) {
  const auto plan = plan_backward(s, mask, presence, deterministic, kBackward, num_sms);
  CHECK_DETAIL(plan.ok(), plan.status().message());
  return plan.value();
}

void head_dims_round_up() {
  for (const auto& [head_dim, compiled] :
       std::vector<std::pair<int, int>>{{8, 64}, {64, 64}, {72, 96}, {96, 96}, {104, 128}}) {
    CHECK(forward(shape(1, 512, 4, head_dim)).key.head_dim == compiled);
  }
  CHECK(backward(shape(1, 512, 4, 72)).key.head_dim == 128);  // no 96 in that list
}

// With an array of lengths tiles go to whoever is free, in the order and size that they had. With
// row intervals, deepest first, and of the larger size where there are enough.
void index_arrays_change_the_order() {
  const auto plan = [](const Shape& s, const IndexPresence& presence) {
    return plan_forward(s, kFull, presence, kForward, kSms).value();
  };
  const Shape large = shape(1, 16384, 16, 128), small = shape(1, 1024, 16, 128);
  CHECK(!plan(large, {}).by_counter && !plan(large, {}).longest_first);
  CHECK(plan(large, {true, false}).by_counter && !plan(large, {true, false}).longest_first);
  CHECK(plan(large, {true, true}).by_counter && plan(large, {true, true}).longest_first);
  CHECK(plan(large, {true, true}).key.block_m == 192);
  CHECK(plan(small, {true, true}).key.block_m == 128);
  CHECK(forward(large, kCausal).by_counter && forward(large, kCausal).longest_first);
}

void tiles_follow_the_makespan() {
  // Long sequences fill every wave: the tile with the faster main loop.
  CHECK(forward(shape(1, 16384, 16, 128)).key.block_m == 192);
  CHECK(forward(shape(1, 16384, 16, 128), kCausal).key.block_m == 192);
  // 132 tiles of 128 rows are one wave; 92 of 192 rows are one wave of longer tiles.
  CHECK(forward(shape(1, 128 * 33, 4, 128)).key.block_m == 128);
  // 256 rows are two blocks of either tile.
  CHECK(forward(shape(64, 256, 8, 128)).key.block_m == 128);
}

void tiles_and_grid() {
  const ForwardPlan plan = forward(shape(2, 1000, 3, 64));
  CHECK(plan.num_m_blocks == (1000 + plan.key.block_m - 1) / plan.key.block_m);
  CHECK(plan.num_tiles == 6 * plan.num_m_blocks);
  CHECK(plan.grid == plan.num_tiles);
  CHECK(forward(shape(8, 16384, 16, 64)).grid == kSms);
  CHECK(forward(shape(8, 16384, 16, 64), kFull, 78).grid == 78);
}

void order_follows_the_mask() {
  CHECK(!forward(shape(1, 4096, 16, 128)).longest_first);
  CHECK(forward(shape(1, 4096, 16, 128)).heads_per_group == 1);
  CHECK(forward(shape(1, 4096, 16, 128), kCausal).longest_first);
  CHECK(!forward(shape(1, 64, 16, 128), kCausal).longest_first);  // one block
  // Only the left side bounded: the first rows are the longest, which is the natural order.
  CHECK(!forward(shape(1, 4096, 16, 128), {256, kUnbounded, 0}).longest_first);
  // An offset past the keys shows every key to every row.
  CHECK(!forward(shape(1, 4096, 16, 128), {kUnbounded, 0, 4096}).longest_first);
}

void heads_of_a_group() {
  CHECK(forward(shape(4, 4096, 16, 128), kCausal).heads_per_group == 32);
  CHECK(forward(shape(4, 4096, 32, 64), kCausal).heads_per_group == 64);
  CHECK(forward(shape(1, 16384, 16, 128), kCausal).heads_per_group == 16);  // there are no more
  // Query heads of one key head stay together.
  Shape gqa = shape(1, 16384, 70, 128);
  gqa.num_heads_kv = 7;
  CHECK(forward(gqa, kCausal).heads_per_group == 40);
  // Tiles that differ in length are handed out by a counter.
  CHECK(forward(gqa, kCausal).longest_first);
  CHECK(!forward(gqa).longest_first);
  // Backward: two tiles for each of 132 CTAs. 1024 keys of d128 are 8 tiles.
  CHECK(backward(shape(4, 1024, 16, 128)).heads_per_group == 32);
  CHECK(backward(shape(1, 8192, 16, 128)).heads_per_group == 4);
  CHECK(backward(shape(1, 65536, 16, 128)).heads_per_group == 1);
  Shape gqa_backward = shape(1, 4096, 64, 128);
  gqa_backward.num_heads_kv = 8;
  CHECK(backward(gqa_backward).heads_per_group == 8);
  // Packed: more heads of a short sequence.
  const auto packed = [](std::int64_t seqlen, std::int64_t heads) {
    const IndexPresence presence{true, /*visibility=*/true};
    return plan_backward(shape(1, seqlen, heads, 128), kFull, presence, false, kBackward, kSms)
        .value();
  };
  CHECK(packed(16384, 32).heads_per_group == 16);
  CHECK(packed(16384, 6).heads_per_group == 6);
  CHECK(packed(65536, 16).heads_per_group == 4);
  CHECK(packed(1 << 20, 16).heads_per_group == 1);
}

void empty_problems() {
  for (const Shape& s : {shape(0, 512, 4, 64), shape(1, 0, 4, 64)}) {
    const ForwardPlan plan = forward(s, kCausal);
    CHECK(plan.num_tiles == 0 && plan.grid == 0);
    CHECK(backward(s, true).grid == 0);
  }
  Shape no_keys = shape(1, 512, 4, 64);
  no_keys.seqlen_k = 0;
  CHECK(forward(no_keys, kCausal).num_tiles > 0);  // zeros have to be written
  CHECK(backward(no_keys).num_tiles == 0);
}

void workspace_layout() {
  const Shape s = shape(3, 1000, 5, 120);
  for (const bool deterministic : {false, true}) {
    const BackwardPlan plan = backward(s, deterministic);
    const std::int64_t rows = 3 * 5 * std::int64_t{plan.num_m_blocks} * plan.key.block_m;
    const auto aligned = [](std::int64_t bytes) { return (bytes + 255) / 256 * 256; };
    CHECK(plan.key.separate_dq == deterministic);
    CHECK(plan.num_m_blocks == 16 && plan.num_n_blocks == 8 && plan.num_tiles == 120);
    CHECK(plan.dq_offset == 0);
    CHECK(plan.statistics_offset == (deterministic ? 0 : aligned(rows * 128 * 4)));
    CHECK(plan.tile_counters_offset == plan.statistics_offset + aligned(rows * 16));
    CHECK(plan.key_maxima_offset == plan.tile_counters_offset + 256);
    CHECK(plan.workspace_bytes == plan.key_maxima_offset);
    CHECK(plan.grid == 120);
    CHECK(plan.dquery.num_tiles == (deterministic ? 3 * 5 * 8 : 0));
    CHECK(plan.dquery.grid == plan.dquery.num_tiles);
  }
}

// Of a fused dQ and row statistics of so many query heads.
std::int64_t bytes_of_heads(std::int64_t heads, std::int64_t seqlen, std::int64_t head_dim) {
  return heads * seqlen * (head_dim * 4 + 16) + 256;  // and the tile counters
}

Shape grouped(std::int64_t batch, std::int64_t seqlen, std::int64_t heads, std::int64_t heads_kv) {
  Shape s = shape(batch, seqlen, heads, 128);
  s.num_heads_kv = heads_kv;
  return s;
}

// A long call is several chunks, and its workspace holds the largest.
void chunks() {
  for (const MaskOptions& mask : {kFull, kCausal}) {
    const BackwardPlan plan = backward(shape(1, 16384, 16, 128), false, mask);
    CHECK(plan.num_chunks == 4 && plan.heads_per_group == 2 && plan.num_tiles == 2048);
    CHECK(plan.workspace_bytes == bytes_of_heads(4, 16384, 128));
    CHECK(test::contains(to_string(plan), "chunks=4"));
  }
  const auto causal = [](const Shape& s) { return backward(s, false, kCausal).num_chunks; };
  CHECK(causal(shape(1, 16384, 9, 128)) == 2 && causal(shape(1, 16384, 12, 128)) == 3);
  CHECK(causal(shape(1, 16384, 7, 128)) == 1);  // three heads are too few
  CHECK(causal(shape(2, 8192, 16, 128)) == 2);
  CHECK(causal(grouped(1, 16384, 32, 8)) == 2 && causal(shape(1, 65536, 16, 128)) == 8);
  // Four heads of 165 tiles are five rounds of CTAs, of equal tiles; of causal ones long tiles of
  // the last head begin late. Of 512 equal tiles no whole heads fill rounds.
  CHECK(backward(shape(1, 21120, 16, 128)).num_chunks == 4);
  CHECK(causal(shape(1, 21120, 16, 128)) == 1);
  CHECK(backward(shape(1, 65536, 16, 128)).num_chunks == 1);
  // Short ones.
  CHECK(causal(shape(8, 2048, 16, 128)) == 1 && causal(shape(4, 4096, 16, 128)) == 1);

  // Of 9 heads in groups of two the second chunk has the last, which is alone.
  const BackwardPlan nine = backward(shape(1, 16384, 9, 128));
  CHECK(nine.chunk(0).first_head == 0 && nine.chunk(0).num_heads == 4);
  CHECK(nine.chunk(1).first_head == 4 && nine.chunk(1).num_heads == 5);
  CHECK(nine.workspace_bytes == bytes_of_heads(5, 16384, 128));
}

// A window makes tiles short; a static offset, of which Python does not tell, changes nothing.
void chunks_of_windows() {
  const Shape s = shape(1, 16384, 16, 128);
  CHECK(backward(s, false, {1023, 0, 0}).num_chunks == 1);
  CHECK(backward(s, false, {8191, 0, 0}).num_chunks == 2);
  CHECK(backward(s, false, {kUnbounded, 0, -16000}).num_chunks == 4);
}

// What arrays hide is not known: only very long calls are divided.
void chunks_of_packed_calls() {
  const auto packed = [](const Shape& s) {
    return backward(s, false, kFull, {true, /*visibility=*/true});
  };
  CHECK(packed(shape(1, 16384, 16, 128)).num_chunks == 1);
  const BackwardPlan plan = packed(shape(1, 65536, 16, 128));
  CHECK(plan.num_chunks == 4 && plan.heads_per_group == 4);
  CHECK(plan.workspace_bytes == bytes_of_heads(4, 65536, 128));
  CHECK(backward(shape(1, 16384, 16, 128), false, kFull, {true, false}).num_chunks == 1);
  CHECK(backward(shape(1, 16384, 16, 128), false, kFull, {true, false, kMask}).num_chunks == 1);
  CHECK(backward(shape(8, 16384, 16, 128), false, kFull, {true, false, kMask}).num_chunks == 8);
}

// Where dQ has a kernel of its own, that needs all row statistics; on a grid it does not.
void chunks_of_deterministic_calls() {
  CHECK(backward(shape(1, 65536, 16, 128), true, kCausal).num_chunks == 1);
  const BackwardPlan plan = backward(shape(1, 16384, 16, 128), true, kCausal);
  CHECK(plan.has_grid && plan.num_chunks == 4);
  CHECK(plan.workspace_bytes == bytes_of_heads(4, 16384, 128) + 16 * 128 * 8);
}

void chunks_cover_the_call() {
  std::set<std::int64_t> numbers;
  for (const std::int64_t seqlen : {1000, 8192, 10752, 16384, 33000, 65536}) {
    for (const std::int64_t heads : {1, 7, 9, 12, 16, 24, 40}) {
      for (const std::int64_t batch : {1, 3, 8}) {
        for (const bool packed : {false, true}) {
          const Shape s = grouped(batch, seqlen, 2 * heads, heads);
          const IndexPresence presence{packed, packed};
          const BackwardPlan plan = backward(s, false, kCausal, presence);
          numbers.insert(plan.num_chunks);
          std::int64_t next = 0, most = 0, least = batch * heads;
          for (std::int64_t i = 0; i < plan.num_chunks; ++i) {
            const BackwardChunk chunk = plan.chunk(i);
            CHECK(chunk.first_head == next && chunk.num_heads > 0);
            CHECK(chunk.first_head % plan.heads_per_group == 0);
            next += chunk.num_heads;
            most = std::max(most, chunk.num_heads);
            least = std::min(least, chunk.num_heads);
          }
          CHECK(next == batch * heads && most - least < 2 * plan.heads_per_group);
          CHECK(plan.workspace_bytes == bytes_of_heads(2 * most, plan.num_m_blocks * 64, 128));
          CHECK(plan.grid == std::min<std::int64_t>(most * plan.num_n_blocks, kSms));
          // A device with fewer multiprocessors, or a margin, finds the workspace it needs.
          for (const int num_sms : {20, 78, 114, 131}) {
            const BackwardPlan other = backward(s, false, kCausal, presence, num_sms);
            CHECK(other.workspace_bytes == plan.workspace_bytes);
            CHECK(other.num_chunks == plan.num_chunks && other.grid <= num_sms);
          }
        }
      }
    }
  }
  CHECK(*numbers.begin() == 1 && *numbers.rbegin() == 8 && numbers.size() > 4);
}

void fused_dq_where_there_is_a_choice() {
  CHECK(!backward(shape(1, 4096, 16, 128)).key.separate_dq);
  CHECK(!backward(shape(1, 4096, 16, 128)).has_grid);
  CHECK(backward(shape(1, 900, 16, 128), true).key.separate_dq);
  CHECK(backward(shape(1, 65536, 16, 128), true).key.separate_dq);
  const BackwardPlan on_grid = backward(grouped(2, 4000, 16, 4), true);
  CHECK(on_grid.has_grid && !on_grid.key.separate_dq && on_grid.dquery.num_tiles == 0);
  CHECK(on_grid.workspace_bytes == on_grid.key_maxima_offset + 2 * 4 * 32 * 8);
  CHECK(test::contains(to_string(on_grid), "dQ on a grid"));
  for (const Variant variant : {Variant::kMask, Variant::kBias}) {
    const Shape s = shape(1, 4096, 4, 128);
    const auto plan = plan_backward(s, kFull, {false, false, variant}, true, kBackward, kSms);
    CHECK(plan.value().key.separate_dq);
  }
  const BackwardKey wide{DType::kBF16, 256, 256, 64, 64, true, kNone};
  CHECK(plan_backward(shape(1, 4096, 16, 256), kFull, {}, false, {wide}, kSms).value().key == wide);
}

// Calls with a bias or a dense mask have kernels of their own, of head dims of their own, and
// others have none of these. A mask takes those of a bias where it has none.
void dense_kernels() {
  const auto forward_key = [](int head_dim, const IndexPresence& presence) {
    return plan_forward(shape(1, 512, 4, head_dim), kFull, presence, kForward, kSms).value().key;
  };
  const auto backward_key = [](int head_dim, const IndexPresence& presence, bool deterministic) {
    const Shape s = shape(1, 512, 4, head_dim);
    return plan_backward(s, kFull, presence, deterministic, kBackward, kSms).value().key;
  };
  for (const bool any : {false, true}) {
    const IndexPresence bias{any, false, kBias}, mask{any, false, kMask};
    const IndexPresence other{any, false, kNone};
    CHECK(forward_key(32, bias).variant == kBias && forward_key(32, bias).head_dim == 32);
    CHECK(forward_key(32, other).variant == kNone && forward_key(32, other).head_dim == 64);
    CHECK(forward_key(32, mask).variant == kMask && forward_key(32, mask).head_dim == 128);
    CHECK(forward_key(40, bias).variant == kBias && forward_key(40, bias).head_dim == 128);
    for (const bool deterministic : {false, true}) {
      CHECK(backward_key(32, bias, deterministic).head_dim == 32);
      CHECK(backward_key(32, other, deterministic).head_dim == 64);
      CHECK(backward_key(128, bias, deterministic).variant == kBias);
      CHECK(backward_key(128, bias, deterministic).separate_dq);
      CHECK(backward_key(128, mask, deterministic).separate_dq == deterministic);
      CHECK(backward_key(128, mask, deterministic).variant == (deterministic ? kBias : kMask));
      CHECK(backward_key(128, other, deterministic).variant == kNone);
    }
  }
  const auto plan =
      plan_backward(shape(1, 500, 4, 32), kFull, {false, false, kBias}, false, kBackward, 78);
  CHECK(plan.value().dquery.num_tiles == 4 * 3);  // of 192 rows
  CHECK(plan.value().num_sms == 78);

  const auto refuses = [](const Status& status, const char* what) {
    CHECK_REFUSES(status, what);
    CHECK_REFUSES(status,
                  "kernel with a bias for bf16 head_dim=192: this build has bf16 "
                  "head dims [32, 128] with it; rebuild");
  };
  const Shape s = shape(1, 1, 1, 192);
  const IndexPresence dense{false, false, kBias};
  refuses(plan_forward(s, kFull, dense, kForward, kSms).status(), "no forward");
  refuses(plan_backward(s, kFull, dense, false, kBackward, kSms).status(), "no backward");
}

BiasWork divide(const Shape& s, const Broadcast& bias, std::int64_t scratch_bytes = 1LL << 40) {
  CallProblem problem;
  problem.shape = s;
  problem.dense.bias_shape = bias;
  const auto work =
      divide_dbias(problem, dbias_block_n(static_cast<int>(s.head_dim)), kSms, scratch_bytes);
  CHECK_DETAIL(work.ok(), work.status().message());
  return work.value();
}

void dbias_tiles_cover_the_bias() {
  const BiasWork all = divide(shape(6, 300, 4, 64), {3, 4, 300});
  CHECK(all.num_tiles == 3 * 4 * 3 * 3 && all.num_steps == 2);
  std::set<std::tuple<int, int, int, int>> blocks;
  for (int item = 0; item < all.num_tiles; ++item) {
    const BiasBlock block = all.tile(item, 128);
    CHECK(block.row % 128 == 0 && block.row < 300 && block.key % 128 == 0 && block.key < 300);
    CHECK(block.head < 4 && block.plane < 3);
    blocks.insert({block.row, block.key, block.head, block.plane});
  }
  CHECK(static_cast<int>(blocks.size()) == all.num_tiles);

  // What is shared is walked instead.
  const BiasWork one = divide(shape(6, 300, 4, 256), {1, 1, 1});
  CHECK(one.num_tiles == 5 && one.num_steps == 6 * 4 * 3 && one.shares_rows);
}

void dbias_slices() {
  // A pair bias has too few tiles for the CTAs: slices fill whole rounds of them.
  const Shape pair = shape(384, 384, 4, 32);
  const Broadcast shared{1, 4, 384};
  const BiasWork sliced = divide(pair, shared);
  CHECK(sliced.num_tiles == 36 && sliced.num_slices == 11 && sliced.slice_steps == 35);
  CHECK((sliced.num_slices - 1) * sliced.slice_steps < sliced.num_steps);
  CHECK(divide(pair, shared, 0).num_slices == 1);
  const std::int64_t bytes = 36 * 128 * 128 * 4;
  CHECK(divide(pair, shared, 3 * bytes).num_slices == 3);
  CHECK(divide(pair, shared, 3 * bytes - 1).num_slices == 2);
  // Where sequences share nothing there is nothing to slice, and many tiles need no slices.
  CHECK(divide(pair, {384, 4, 384}).num_slices == 1);
  CHECK(divide(shape(8, 2048, 16, 64), {1, 16, 2048}).num_slices == 1);
}

void beyond_32_bits() {
  const Shape s = shape(4, 65536, 128, 128);  // 2^32 elements
  CHECK(backward(shape(16, 65536, 128, 128)).workspace_bytes > 2 * (std::int64_t{1} << 32));
  CHECK(forward(s).num_tiles == 4 * 128 * 342);

  Shape tiles = shape(1 << 24, 4096, 32, 64);
  CHECK_REFUSES(plan_forward(tiles, kFull, {}, kForward, kSms).status(), "below 2^31");
  CHECK_REFUSES(plan_backward(tiles, kFull, {}, false, kBackward, kSms).status(), "below 2^31");
  Shape bytes = shape((1LL << 31) - 1, 1 << 28, (1LL << 31) - 1, 128);
  CHECK_REFUSES(plan_backward(bytes, kFull, {}, false, kBackward, kSms).status(), "64-bit");
}

void refusals() {
  const auto refuses = [](const Shape& s, const char* part) {
    CHECK_REFUSES(plan_forward(s, kFull, {}, kForward, kSms).status(), part);
    CHECK_REFUSES(plan_backward(s, kFull, {}, false, kBackward, kSms).status(), part);
  };
  refuses(shape(-1, 1, 1, 64), "batch must be in [0, 2147483647], got -1");
  refuses(shape(1, (1 << 28) + 1, 1, 64), "seqlen_q must be in [0, 268435456], got 268435457");
  refuses(shape(1, 1, 0, 64), "num_heads_q must be in [1, 2147483647], got 0");
  refuses(shape(1, 1, 1, 60), "head_dim must be a multiple of 8 in [8, 256], got 60");
  refuses(shape(1, 1, 1, 264), "got 264");
  refuses(shape(1, 1, 1, 192), "bf16 head_dim=192: this build has bf16 head dims [64");
  refuses(shape(1, 1, 1, 192), "JAX_FA3_HEAD_DIMS");
  Shape s = shape(1, 1, 6, 64);
  s.num_heads_kv = 4;
  refuses(s, "num_heads_q must be a multiple of num_heads_kv, got 6 and 4");
  s = shape(1, 1, 1, 64);
  s.head_dim_v = 60;
  refuses(s, "head_dim_v must be a multiple of 8 in [8, 256], got 60");
  s = shape(1, 1, 1, 64);
  s.dtype = DType::kFP16;
  refuses(s, "no ");
  s.dtype = static_cast<DType>(7);
  refuses(s, "got code 7");
  const auto refuses_mask = [](const MaskOptions& mask, const char* part) {
    CHECK_REFUSES(plan_forward(shape(1, 1, 1, 64), mask, {}, kForward, kSms).status(), part);
  };
  refuses_mask({-1, 0, 0}, "window_left must be in [0, 1073741824], got -1");
  refuses_mask({0, -1, 0}, "window_right");
  refuses_mask({0, 0, -kMaxSeqlen - 1}, "query_offset");
  CHECK_REFUSES(plan_forward(shape(1, 1, 1, 64), kFull, {}, kForward, 0).status(), "num_sms");
}

const std::vector<ForwardFloat8Key> kFloat8 = {{64, 64, 192, 128},
                                               {128, 128, 192, 128},
                                               {128, 128, 128, 128},
                                               {192, 128, 128, 128},
                                               {256, 256, 128, 128}};

ForwardFloat8Plan float8(const Shape& s, const MaskOptions& mask = kFull, bool prepared = true) {
  const auto plan = plan_forward_float8(s, mask, {}, prepared, kFloat8, kSms);
  CHECK_DETAIL(plan.ok(), plan.status().message());
  return plan.value();
}

void float8_tiles() {
  CHECK(float8(shape(1, 512, 4, 80)).key.head_dim == 128);
  CHECK(float8(shape(1, 512, 4, 208)).key.head_dim == 256);
  CHECK(float8(shape(1, 16384 / 2, 16, 64)).key.block_m == 192);
  Shape values = shape(1, 512, 4, 144);
  values.head_dim_v = 96;
  CHECK(float8(values).key.head_dim == 192 && float8(values).key.head_dim_v == 128);
  CHECK(float8(shape(1, 4096, 16, 128), kCausal).longest_first);
  CHECK(float8(shape(8, 16384, 16, 128)).grid == kSms);
}

void float8_workspace() {
  Shape s = shape(3, 1000, 6, 80);
  s.num_heads_kv = 2;
  CHECK(float8(s).workspace_bytes == 0 && float8(s).transpose_blocks == 0);
  CHECK(float8(s, kFull, false).workspace_bytes == 3 * 2 * 80 * 1024);
  CHECK(float8(s, kFull, false).transpose_blocks == 3 * 2 * 2 * 8);
  s.seqlen_k = 0;
  CHECK(float8(s, kFull, false).workspace_bytes == 0 && float8(s).num_tiles > 0);
  CHECK(float8(shape(0, 512, 4, 64), kFull, false).num_tiles == 0);
}

void float8_refusals() {
  const auto refuses = [](const Shape& s, const char* part) {
    CHECK_REFUSES(plan_forward_float8(s, kFull, {}, false, kFloat8, kSms).status(), part);
  };
  refuses(shape(1, 1, 1, 72), "head_dim must be a multiple of 16 for float8");
  Shape s = shape(1, 1, 1, 64);
  s.head_dim_v = 24;
  refuses(s, "head_dim_v must be a multiple of 16 for float8 (rows of whole 16 bytes), got 24");
  s = shape(1, 1, 1, 64);
  s.head_dim_v = 272;
  refuses(s, "head_dim_v must be a multiple of 8 in [8, 256], got 272");
  refuses(shape((1LL << 31) - 1, 1 << 28, (1LL << 31) - 1, 128), "64-bit");
  CHECK_REFUSES(
      plan_forward_float8(shape(1, 1, 1, 256), kFull, {}, false, {kFloat8[0]}, kSms).status(),
      "no forward kernel for e4m3 head_dim=256: this build has e4m3 head dims [64]");
  CHECK_REFUSES(plan_forward_float8(shape(1, 1, 1, 64), kFull, {}, false, kFloat8, 0).status(),
                "num_sms");
}

const std::vector<ForwardCachedKey> kCached = {{DType::kBF16, 128, 128, 64},
                                               {DType::kBF16, 128, 128, 128},
                                               {DType::kBF16, 128, 128, 16},
                                               {DType::kBF16, 192, 128, 16},
                                               {DType::kBF16, 256, 256, 32}};

StatusOr<ForwardCachedPlan> cached(std::int64_t batch, std::int64_t rows, int heads_q, int heads_kv,
                                   bool is_ragged = false, int page_size = 0, int head_dim = 128) {
  const Shape shape{DType::kBF16, batch, rows, 4096, heads_q, heads_kv, head_dim, 128};
  return plan_forward_cached(shape, is_ragged, page_size, kCached, kSms);
}

// The kernel with the smallest blocks that takes a sequence's rows at once. Of ragged rows a
// sequence may have all but one of each other.
void cached_blocks() {
  const auto rows = [](const auto& plan) { return plan.ok() ? plan.value().key.block_rows : -1; };
  CHECK(rows(cached(8, 1, 32, 8)) == 16 && rows(cached(8, 4, 32, 8)) == 16);
  CHECK(rows(cached(8, 5, 32, 8)) == 64 && rows(cached(8, 16, 32, 8)) == 64);
  CHECK(rows(cached(8, 17, 32, 8)) == 128 && rows(cached(8, 100, 32, 8)) == 128);
  CHECK(rows(cached(8, 8, 32, 8, true)) == 16 && rows(cached(8, 11, 32, 8, true)) == 16);
  CHECK(rows(cached(8, 12, 32, 8, true)) == 64 && rows(cached(8, 23, 32, 8, true)) == 64);
  CHECK(rows(cached(8, 24, 32, 8, true)) == 128 && rows(cached(8, 1, 32, 8, true)) == 16);
  CHECK(rows(cached(8, 100, 32, 8, false, 0, 200)) == 32);
  CHECK(cached(8, 1, 32, 8, false, 0, 136).value().key.head_dim == 192);
}

// A CTA for each kv head of a group, and as many groups as there is room for. Partial results and
// counters are for groups that share.
void cached_grid() {
  for (const int heads : {1, 2, 5, 8, 66, 67, 132, 133, 200, 264, 1000}) {
    const auto plan = cached(1, 1, heads, heads).value();
    CHECK(plan.grid == plan.groups * plan.heads_at_once && plan.grid <= kSms && plan.grid > 0);
    CHECK(plan.groups == 1 || plan.heads_at_once == heads);
    const int rounds = ceil_div(heads, plan.heads_at_once);
    CHECK(rounds == ceil_div(heads, kSms) && plan.heads_at_once * rounds < heads + rounds);
    CHECK(plan.num_counters == (plan.groups > 1 ? plan.grid : 0));
    CHECK(plan.workspace_bytes == (plan.groups > 1 ? 2 * plan.grid * 16 * 130 * 4 : 0));
  }
  CHECK(cached(64, 1, 32, 8).value().grid == 128);
}

// Groups of rows share rounds of heads: all rounds have as many, and next to all multiprocessors
// have work.
void cached_rounds() {
  for (const int heads : {1, 2, 5, 8, 40, 48, 66, 67, 70, 132, 133, 200, 264, 1000}) {
    const auto plan = cached(1, 512, heads, heads).value();
    CHECK(plan.key.block_rows == 128 && heads % plan.heads_at_once == 0);
    CHECK(plan.grid == plan.groups * plan.heads_at_once && plan.grid <= kSms);
    CHECK(20 * plan.grid >= 19 * kSms);
    CHECK(plan.num_counters == (plan.groups > 1 ? 2 * plan.grid : 0));
    CHECK(plan.workspace_bytes == (plan.groups > 1 ? 2 * plan.grid * 128 * 130 * 4 : 0));
  }
  CHECK(cached(1, 512, 32, 8).value().heads_at_once == 8);
  CHECK(cached(1, 512, 40, 40).value().heads_at_once == 10);
}

void cached_refusals() {
  CHECK_REFUSES(cached(1, 1, 8, 8, false, 12).status(),
                "page_size must be a multiple of 8, got 12");
  CHECK_REFUSES(cached(1, 1, 8, 8, false, 0, 264).status(), "head_dim must be a multiple of 8 in");
  CHECK_REFUSES(cached(1, 1, 9, 2).status(), "num_heads_q must be a multiple of num_heads_kv");
  CHECK_REFUSES(cached(1 << 20, 1 << 10, 8, 8).status(), "query rows of all heads must be at most");
  CHECK_REFUSES(cached((1 << 28) + 1, 0, 8, 8).status(), "batch must be at most");
  const auto other =
      plan_forward_cached({DType::kFP16, 1, 1, 64, 8, 8, 64, 64}, false, 0, kCached, kSms);
  CHECK_REFUSES(other.status(), "no forward_cached kernel for fp16 head_dim=64");
}

void printable() {
  CHECK(test::contains(to_string(forward(shape(1, 512, 4, 64))), "forward bf16 head_dim=64/64"));
  CHECK(test::contains(to_string(float8(shape(1, 512, 4, 64))), "forward float8 head_dim=64/64"));
  CHECK(test::contains(to_string(backward(shape(1, 512, 4, 64), true)), "separate dQ"));
  CHECK(test::contains(to_string(cached(1, 1, 32, 8).value()), "block_rows=16 heads_at_once=8"));
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::head_dims_round_up();
  jax_fa3::index_arrays_change_the_order();
  jax_fa3::tiles_follow_the_makespan();
  jax_fa3::tiles_and_grid();
  jax_fa3::order_follows_the_mask();
  jax_fa3::heads_of_a_group();
  jax_fa3::empty_problems();
  jax_fa3::workspace_layout();
  jax_fa3::chunks();
  jax_fa3::chunks_of_windows();
  jax_fa3::chunks_of_packed_calls();
  jax_fa3::chunks_of_deterministic_calls();
  jax_fa3::chunks_cover_the_call();
  jax_fa3::fused_dq_where_there_is_a_choice();
  jax_fa3::dense_kernels();
  jax_fa3::dbias_tiles_cover_the_bias();
  jax_fa3::dbias_slices();
  jax_fa3::beyond_32_bits();
  jax_fa3::refusals();
  jax_fa3::float8_tiles();
  jax_fa3::float8_workspace();
  jax_fa3::float8_refusals();
  jax_fa3::cached_blocks();
  jax_fa3::cached_grid();
  jax_fa3::cached_rounds();
  jax_fa3::cached_refusals();
  jax_fa3::printable();
  return jax_fa3::test::finish();
}
