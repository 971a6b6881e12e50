// Where a producer gets the tiles of key and value from. A kernel's Source is one of these
// policies, and its parameters have the tensor maps `key` and `value`. One thread calls them; the
// bytes of a tile complete on `full`.
#pragma once

#include "device/tma.cuh"

namespace jax_fa3 {

// Dense arrays: key [b, s_k, h_kv, d], value [b, s_k, h_kv, d_v].
template <class KTile, class VTile>
struct Contiguous {
  // The tile whose first row is `row`.
  template <class Params>
  CUTE_DEVICE static void load_key(const Params& p, TransactionBarrier& full,
                                   typename KTile::Element* smem, int row, int head, int batch) {
    load_tile<KTile>(p.key, full, kEvictLast, smem, row, head, batch);
  }
  template <class Params>
  CUTE_DEVICE static void load_value(const Params& p, TransactionBarrier& full,
                                     typename VTile::Element* smem, int row, int head, int batch) {
    load_tile<VTile>(p.value, full, kEvictLast, smem, row, head, batch);
  }
};

// The same with value prepared (prepared_value.h): [b, h_kv, d_v, padded keys].
template <class KTile, class VTile>
struct ContiguousPrepared : Contiguous<KTile, VTile> {
  template <class Params>
  CUTE_DEVICE static void load_value(const Params& p, TransactionBarrier& full,
                                     typename VTile::Element* smem, int row, int head, int batch) {
    load_plane<VTile>(p.value, full, kEvictLast, smem, 0, row, head, batch);
  }
};

}  // namespace jax_fa3
