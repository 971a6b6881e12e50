#include "kernels/dense_mask/dense_mask.h"

#include <algorithm>
#include <limits>

#include "call/shape.h"
#include "call/text.h"

namespace jax_fa3 {
namespace {

constexpr std::int64_t kMostWords = std::numeric_limits<std::int32_t>::max();

Status check_range(const char* name, std::int64_t value, std::int64_t high) {
  if (value >= 0 && value <= high) return {};
  return invalid_argument(concat(name, " must be in [0, ", high, "], got ", value));
}

}  // namespace

MaskTiles mask_tiles(const Shape& shape) {
  const auto tiles = [](std::int64_t extent, std::int64_t of_tile) {
    return std::max<std::int64_t>(ceil_div(extent, of_tile), 1);
  };
  return {tiles(shape.seqlen_q, kMaskTileRows), tiles(shape.seqlen_k, kMaskTileKeys)};
}

Status check_dense_mask(const DenseMaskProblem& problem) {
  const Shape& s = problem.shape;
  JFA_CHECK_OK(check_range("the mask's rows", s.seqlen_q, kMaxSeqlen));
  JFA_CHECK_OK(check_range("the mask's keys", s.seqlen_k, kMaxSeqlen));
  const std::int64_t words = layout_of(problem).words();
  JFA_CHECK_OK(check_range("words of a plane of mask_table", words, kMostWords));
  if (problem.words != words) {
    return invalid_argument(concat("mask_table must have ", words, " words of a plane for ",
                                   s.seqlen_q, " rows and ", s.seqlen_k, " keys, got ",
                                   problem.words));
  }
  const MaskTiles tiles = mask_tiles(s);
  const auto blocks = count_tiles(s.batch, s.num_heads_q, tiles.of_rows * tiles.of_keys);
  return blocks.ok() ? Status() : blocks.status();
}

}  // namespace jax_fa3
