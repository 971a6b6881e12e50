// What every kernel asks of a problem's extents, and arithmetic on them that cannot overflow.
#pragma once

#include <initializer_list>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "call/problem.h"
#include "call/status.h"

namespace jax_fa3 {

constexpr std::int64_t kMaxHeadDim = 256;
constexpr std::int64_t kHeadDimMultiple = 8;  // 16 bytes, the granularity of a TMA box

// The extents any kernel of either direction accepts; the message names got and expected.
Status check_shape(const Shape& shape);

// Windows are 0..kUnbounded columns a side, the static offset within +/- kMaxSeqlen.
Status check_mask(const MaskOptions& mask);

// The head dims of the eligible kernels, ascending.
template <class Key, class Eligible>
std::vector<int> compiled_head_dims(const std::vector<Key>& available, const Eligible& eligible) {
  std::set<int> dims;
  for (const Key& key : available) {
    if (eligible(key)) dims.insert(key.head_dim);
  }
  return {dims.begin(), dims.end()};
}

// The eligible kernels whose head dims are the smallest that hold the shape's; none if none do.
template <class Key, class Eligible>
std::vector<Key> fitting_kernels(const Shape& shape, const std::vector<Key>& available,
                                 const Eligible& eligible) {
  std::vector<Key> fitting;
  const auto dims = [](const Key& key) { return std::pair(key.head_dim, key.head_dim_v); };
  for (const Key& key : available) {
    if (!eligible(key) || key.head_dim < shape.head_dim || key.head_dim_v < shape.head_dim_v) {
      continue;
    }
    if (!fitting.empty() && dims(key) > dims(fitting.front())) continue;
    if (!fitting.empty() && dims(key) < dims(fitting.front())) fitting.clear();
    fitting.push_back(key);
  }
  return fitting;
}

// Why no kernel of `dtype` takes the shape, and the build option that would add one.
std::string no_kernel_message(const char* direction, const char* dtype, const Shape& shape,
                              const std::vector<int>& head_dims, Variant variant = Variant::kPlain);
inline std::string no_kernel_message(const char* direction, const Shape& shape,
                                     const std::vector<int>& head_dims,
                                     Variant variant = Variant::kPlain) {
  return no_kernel_message(direction, to_string(shape.dtype), shape, head_dims, variant);
}

// (batch, query head) pairs in a group of a kernel whose work tiles are blocks of queries, under a
// causal mask; those that share K and V stay together. In a group blocks of all heads go out
// deepest first: with few heads its CTAs are at too many depths at a time to read the same keys
// together, with many a short sequence's K and V have left L2 when they are read again. Measured
// best at every length from 512 to 16384: 32, and 64 narrow ones.
std::int32_t query_heads_per_group(const Shape& shape);

// batch * num_heads * num_blocks, which the kernels index with 32 bits.
StatusOr<std::int64_t> count_tiles(std::int64_t batch, std::int64_t num_heads,
                                   std::int64_t num_blocks);

// The product of non-negative factors, or an error that says what it was to measure.
StatusOr<std::int64_t> checked_product(const char* what,
                                       std::initializer_list<std::int64_t> factors);

}  // namespace jax_fa3
