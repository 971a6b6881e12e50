#include "call/shape.h"

#include <algorithm>
#include <limits>

#include "call/text.h"

namespace jax_fa3 {
namespace {

constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();

Status check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return {};
  return invalid_argument(concat(name, " must be in [", low, ", ", high, "], got ", value));
}

Status check_head_dim(const char* name, std::int64_t value) {
  if (value >= kHeadDimMultiple && value <= kMaxHeadDim && value % kHeadDimMultiple == 0) return {};
  return unimplemented(concat(name, " must be a multiple of ", kHeadDimMultiple, " in [",
                              kHeadDimMultiple, ", ", kMaxHeadDim, "], got ", value));
}

}  // namespace

Status check_shape(const Shape& shape) {
  if (shape.dtype != DType::kBF16 && shape.dtype != DType::kFP16) {
    return invalid_argument(
        concat("dtype must be bf16 or fp16, got code ", static_cast<std::int32_t>(shape.dtype)));
  }
  JFA_CHECK_OK(check_range("batch", shape.batch, 0, kInt32Max));
  JFA_CHECK_OK(check_range("seqlen_q", shape.seqlen_q, 0, kMaxSeqlen));
  JFA_CHECK_OK(check_range("seqlen_k", shape.seqlen_k, 0, kMaxSeqlen));
  JFA_CHECK_OK(check_range("num_heads_q", shape.num_heads_q, 1, kInt32Max));
  JFA_CHECK_OK(check_range("num_heads_kv", shape.num_heads_kv, 1, kInt32Max));
  if (shape.num_heads_q % shape.num_heads_kv != 0) {
    return invalid_argument(concat("num_heads_q must be a multiple of num_heads_kv, got ",
                                   shape.num_heads_q, " and ", shape.num_heads_kv));
  }
  JFA_CHECK_OK(check_head_dim("head_dim", shape.head_dim));
  return check_head_dim("head_dim_v", shape.head_dim_v);
}

Status check_mask(const MaskOptions& mask) {
  JFA_CHECK_OK(check_range("window_left", mask.window_left, 0, kUnbounded));
  JFA_CHECK_OK(check_range("window_right", mask.window_right, 0, kUnbounded));
  return check_range("query_offset", mask.query_offset, -kMaxSeqlen, kMaxSeqlen);
}

std::string no_kernel_message(const char* direction, const char* dtype, const Shape& shape,
                              const std::vector<int>& head_dims, Variant variant) {
  const char* const kWith[] = {"", "with a mask ", "with a bias ", "with softcap ", "with slopes "};
  const bool is_plain = variant == Variant::kPlain;
  std::string built;
  for (const int dim : head_dims) built += concat(built.empty() ? "" : ", ", dim);
  std::string wanted = concat(" head_dim=", shape.head_dim);
  if (shape.head_dim_v != shape.head_dim) wanted += concat(" head_dim_v=", shape.head_dim_v);
  return concat("no ", direction, " kernel ", kWith[static_cast<int>(variant)], "for ", dtype,
                wanted, ": this build has ", dtype, " head dims [", built, "]",
                is_plain ? "" : " with it", "; rebuild with JAX_FA3_HEAD_DIMS and JAX_FA3_DTYPES ",
                "(CMake options) that cover it");
}

std::int32_t query_heads_per_group(const Shape& shape) {
  const std::int64_t wanted = shape.head_dim <= 64 ? 64 : 32;
  const std::int64_t sharing = shape.num_heads_q / shape.num_heads_kv;
  const std::int64_t rounded = ceil_div(wanted, sharing) * sharing;
  return static_cast<std::int32_t>(std::min(rounded, shape.batch * shape.num_heads_q));
}

StatusOr<std::int64_t> count_tiles(std::int64_t batch, std::int64_t num_heads,
                                   std::int64_t num_blocks) {
  const auto num_tiles = checked_product("number of work tiles", {batch, num_heads, num_blocks});
  if (!num_tiles.ok() || num_tiles.value() <= kInt32Max) return num_tiles;
  return invalid_argument(concat("batch * heads * blocks must be below 2^31, got ", batch, " * ",
                                 num_heads, " * ", num_blocks));
}

StatusOr<std::int64_t> checked_product(const char* what,
                                       std::initializer_list<std::int64_t> factors) {
  std::int64_t product = 1;
  for (const std::int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      return invalid_argument(concat(what, " exceeds 64-bit arithmetic"));
    }
  }
  return product;
}

}  // namespace jax_fa3
