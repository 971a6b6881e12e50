#include "kernels/quantize/quantize.h"

#include <algorithm>

#include "attention/prepare_value.h"
#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

Status check_multiple(const char* name, std::int64_t value) {
  if (value % kQuantizeHeadDimMultiple == 0) return {};
  return unimplemented(
      concat(name, " must be a multiple of ", kQuantizeHeadDimMultiple, ", got ", value));
}

Status check_some(const char* name, std::int64_t value) {
  if (value > 0) return {};
  return invalid_argument(concat(name, " must be positive, got ", value));
}

}  // namespace

Status check_quantize(const Shape& shape) {
  JFA_CHECK_OK(check_shape(shape));
  JFA_CHECK_OK(check_multiple("head_dim", shape.head_dim));
  JFA_CHECK_OK(check_multiple("head_dim_v", shape.head_dim_v));
  JFA_CHECK_OK(check_some("batch", shape.batch));
  JFA_CHECK_OK(check_some("seqlen_q", shape.seqlen_q));
  JFA_CHECK_OK(check_some("seqlen_k", shape.seqlen_k));
  const auto blocks = [](std::int64_t seqlen) {
    return ceil_div<std::int64_t>(seqlen, kDescaleBlock);
  };
  // One launch takes the blocks of query and key, another a few for each of value.
  const std::int64_t heads = shape.num_heads_q + shape.num_heads_kv;
  const auto rows =
      count_tiles(shape.batch, heads, blocks(std::max(shape.seqlen_q, shape.seqlen_k)));
  if (!rows.ok()) return rows.status();
  const auto columns = ceil_div<std::int64_t>(shape.head_dim_v, kPrepareColumns);
  const auto value = count_tiles(shape.batch, shape.num_heads_kv * columns, blocks(shape.seqlen_k));
  return value.ok() ? Status() : value.status();
}

}  // namespace jax_fa3
