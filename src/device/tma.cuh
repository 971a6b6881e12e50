// TMA: tensor maps of (batch, seq, heads, head_dim) arrays, tile loads and stores.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cutlass/cuda_host_adapter.hpp>

#include "base/problem.h"
#include "base/status.h"
#include "device/tile.cuh"

namespace jax_fa3 {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

// L2 eviction priorities, as cache-hint operands of TMA instructions.
constexpr std::uint64_t kEvictFirst =
    static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
constexpr std::uint64_t kEvictLast =
    static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

// The map of a dense (batch, seqlen, heads, head_dim) array of 16-bit elements, in boxes of
// kRows rows of one head by one chunk of columns. Elements outside the array read as zero and
// are not written. An empty extent becomes 1: such a map is never used to load or store.
template <class Tile>
Status make_tensor_map(CUtensorMap* map, const void* data, DType dtype, std::int64_t batch,
                       std::int64_t seqlen, std::int64_t heads, std::int64_t head_dim,
                       int rows = Tile::kRows) {
  const auto extent = [](std::int64_t n) { return static_cast<cuuint64_t>(n > 0 ? n : 1); };
  const cuuint64_t extents[4] = {extent(head_dim), extent(heads), extent(seqlen), extent(batch)};
  const cuuint64_t row_bytes = extents[0] * sizeof(typename Tile::Element);
  const cuuint64_t strides[3] = {row_bytes, row_bytes * extents[1],
                                 row_bytes * extents[1] * extents[2]};
  const cuuint32_t box[4] = {Tile::kChunkCols, 1, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      map,
      dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(data), extents, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      Tile::kChunkCols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return internal_error("cuTensorMapEncodeTiled returned CUresult " + std::to_string(result) +
                          " for an array of shape (" + std::to_string(batch) + ", " +
                          std::to_string(seqlen) + ", " + std::to_string(heads) + ", " +
                          std::to_string(head_dim) + ")");
  }
  return {};
}

// Loads the rows of one box (make_tensor_map's `rows`) from `row` of one head to `smem_row` of the
// tile; completes their bytes on `barrier`. One thread calls it.
template <class Tile>
CUTE_DEVICE void load_rows(const CUtensorMap& map, TransactionBarrier& barrier,
                           std::uint64_t cache_hint, typename Tile::Element* smem, int smem_row,
                           int row, int head, int batch) {
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), cache_hint,
                                 smem + chunk * Tile::kChunkElements + smem_row * Tile::kChunkCols,
                                 chunk * Tile::kChunkCols, head, row, batch);
  }
}

// Loads rows [row, row + kRows) of one head: a whole tile, in one box.
template <class Tile>
CUTE_DEVICE void load_tile(const CUtensorMap& map, TransactionBarrier& barrier,
                           std::uint64_t cache_hint, typename Tile::Element* smem, int row,
                           int head, int batch) {
  load_rows<Tile>(map, barrier, cache_hint, smem, 0, row, head, batch);
}

// Loads `bytes` contiguous bytes, a multiple of 16. One thread calls it.
CUTE_DEVICE void load_bytes(const void* global, TransactionBarrier& barrier, void* smem,
                            int bytes) {
  cute::SM90_BULK_COPY_G2S::copy(global, reinterpret_cast<std::uint64_t*>(&barrier), smem, bytes);
}

// Stores the rows of one box (make_tensor_map's `rows`), which start at `smem_row` of the tile, to
// rows from `row` and columns from `col` of one head. One thread calls it.
template <class Tile>
CUTE_DEVICE void store_tile(const CUtensorMap& map, const typename Tile::Element* smem,
                            int smem_row, int row, int head, int batch, int col = 0) {
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    cute::SM90_TMA_STORE_4D::copy(&map,
                                  smem + chunk * Tile::kChunkElements + smem_row * Tile::kChunkCols,
                                  col + chunk * Tile::kChunkCols, head, row, batch);
  }
}

}  // namespace jax_fa3
