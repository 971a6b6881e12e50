// TMA: tensor maps of (batch, seq, heads, head_dim) and (batch, heads, rows, cols) arrays, tile
// loads and stores.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cutlass/cuda_host_adapter.hpp>
#include <initializer_list>

#include "call/problem.h"
#include "call/status.h"
#include "device/tile.cuh"

namespace jax_fa3 {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

// Fetches tensor maps of the kernel's parameters before the first load waits for them.
CUTE_DEVICE void prefetch_maps(std::initializer_list<const CUtensorMap*> maps) {
  for (const CUtensorMap* map : maps) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
  }
}

// L2 eviction priorities, as cache-hint operands of TMA instructions.
constexpr std::uint64_t kEvictFirst =
    static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
constexpr std::uint64_t kEvictLast =
    static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

template <class Element>
constexpr CUtensorMapDataType tensor_map_type() {
  if (sizeof(Element) == 1) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (cute::is_same_v<Element, cutlass::bfloat16_t>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (cute::is_same_v<Element, cutlass::half_t>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return CU_TENSOR_MAP_DATA_TYPE_UINT16;
}

// The map of an array of Tile's elements, in boxes of one chunk of Tile's columns; extents and box
// in elements, strides of all dimensions but the innermost in elements, innermost first. A stride
// of 0 has a dimension's elements be the same. Elements outside the array read as zero and are not
// written. An empty extent becomes 1: such a map is never used to load or store.
template <class Tile>
Status encode_tensor_map(CUtensorMap* map, const void* data, const std::int64_t (&shape)[4],
                         const std::int64_t (&strides)[3], const cuuint32_t (&box)[4]) {
  cuuint64_t extents[4], byte_strides[3];
  for (int i = 0; i < 4; ++i) extents[i] = static_cast<cuuint64_t>(shape[i] > 0 ? shape[i] : 1);
  for (int i = 0; i < 3; ++i) {
    byte_strides[i] = static_cast<cuuint64_t>(strides[i]) * sizeof(typename Tile::Element);
  }
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      map, tensor_map_type<typename Tile::Element>(), 4, const_cast<void*>(data), extents,
      byte_strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      Tile::kChunkBytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
      : Tile::kChunkBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                : CU_TENSOR_MAP_SWIZZLE_32B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return internal_error("cuTensorMapEncodeTiled returned CUresult " + std::to_string(result) +
                          " for an array of shape (" + std::to_string(shape[3]) + ", " +
                          std::to_string(shape[2]) + ", " + std::to_string(shape[1]) + ", " +
                          std::to_string(shape[0]) + ")");
  }
  return {};
}

// The same of a dense array.
template <class Tile>
Status encode_tensor_map(CUtensorMap* map, const void* data, const std::int64_t (&shape)[4],
                         const cuuint32_t (&box)[4]) {
  std::int64_t strides[3];
  for (int i = 0; i < 3; ++i) {
    strides[i] = (shape[i] > 0 ? shape[i] : 1) * (i == 0 ? 1 : strides[i - 1]);
  }
  return encode_tensor_map<Tile>(map, data, shape, strides, box);
}

// A (batch, seqlen, heads, head_dim) array, in boxes of `rows` rows of one head.
template <class Tile>
Status make_tensor_map(CUtensorMap* map, const void* data, std::int64_t batch, std::int64_t seqlen,
                       std::int64_t heads, std::int64_t head_dim, int rows = Tile::kRows) {
  return encode_tensor_map<Tile>(map, data, {head_dim, heads, seqlen, batch},
                                 {Tile::kChunkCols, 1, static_cast<cuuint32_t>(rows), 1});
}

// A (batch, heads, rows, cols) array, in boxes of Tile's rows of one head.
template <class Tile>
Status make_plane_map(CUtensorMap* map, const void* data, std::int64_t batch, std::int64_t heads,
                      std::int64_t rows, std::int64_t cols) {
  return encode_tensor_map<Tile>(map, data, {cols, rows, heads, batch},
                                 {Tile::kChunkCols, Tile::kRows, 1, 1});
}

// Loads one chunk's columns of a box, whose innermost coordinate is the chunk's first column, to
// `smem_row` of the tile; completes its bytes on `barrier`. One thread calls it.
template <class Tile>
CUTE_DEVICE void load_chunk(const CUtensorMap& map, TransactionBarrier& barrier,
                            std::uint64_t cache_hint, typename Tile::Element* smem, int smem_row,
                            int chunk, int row, int head, int batch) {
  cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), cache_hint,
                               smem + chunk * Tile::kChunkElements + smem_row * Tile::kChunkCols,
                               chunk * Tile::kChunkCols, head, row, batch);
}

// Loads the rows of one box (make_tensor_map's `rows`) from `row` of one head to `smem_row` of the
// tile; completes their bytes on `barrier`. One thread calls it.
template <class Tile>
CUTE_DEVICE void load_rows(const CUtensorMap& map, TransactionBarrier& barrier,
                           std::uint64_t cache_hint, typename Tile::Element* smem, int smem_row,
                           int row, int head, int batch) {
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    load_chunk<Tile>(map, barrier, cache_hint, smem, smem_row, chunk, row, head, batch);
  }
}

// Loads rows [row, row + kRows) of one head: a whole tile, in one box.
template <class Tile>
CUTE_DEVICE void load_tile(const CUtensorMap& map, TransactionBarrier& barrier,
                           std::uint64_t cache_hint, typename Tile::Element* smem, int row,
                           int head, int batch) {
  load_rows<Tile>(map, barrier, cache_hint, smem, 0, row, head, batch);
}

// Brings a whole tile into L2.
template <class Tile>
CUTE_DEVICE void prefetch_tile(const CUtensorMap& map, int row, int head, int batch) {
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&map, chunk * Tile::kChunkCols, head, row, batch);
  }
}

// Loads Tile's rows from `row` on and columns from `col` on of one head, of a map by
// make_plane_map.
template <class Tile>
CUTE_DEVICE void load_plane(const CUtensorMap& map, TransactionBarrier& barrier,
                            std::uint64_t cache_hint, typename Tile::Element* smem, int row,
                            int col, int head, int batch) {
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), cache_hint,
                                 smem + chunk * Tile::kChunkElements,
                                 col + chunk * Tile::kChunkCols, row, head, batch);
  }
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

// The same of a map by make_plane_map, from `row` and `col` of one head.
template <class Tile>
CUTE_DEVICE void store_plane(const CUtensorMap& map, const typename Tile::Element* smem,
                             int smem_row, int row, int col, int head, int batch) {
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    cute::SM90_TMA_STORE_4D::copy(&map,
                                  smem + chunk * Tile::kChunkElements + smem_row * Tile::kChunkCols,
                                  col + chunk * Tile::kChunkCols, row, head, batch);
  }
}

}  // namespace jax_fa3
