// Tensor maps of a call's dense arrays, by what their rows are.
#pragma once

#include "call/problem.h"
#include "device/tma.cuh"

namespace jax_fa3 {

struct CallMaps {
  const Shape& shape;
  // An array without elements may have no address. Its map is never used, but must have one.
  const void* some_address;

  // [b, s_q, h_q, head_dim], in boxes of `rows` rows.
  template <class Tile>
  Status of_queries(CUtensorMap* map, const void* data, std::int64_t head_dim,
                    int rows = Tile::kRows) const {
    return make_tensor_map<Tile>(map, data != nullptr ? data : some_address, shape.batch,
                                 shape.seqlen_q, shape.num_heads_q, head_dim, rows);
  }

  // [b, s_k, h_kv, head_dim], in boxes of `rows` rows.
  template <class Tile>
  Status of_keys(CUtensorMap* map, const void* data, std::int64_t head_dim,
                 int rows = Tile::kRows) const {
    return make_tensor_map<Tile>(map, data != nullptr ? data : some_address, shape.batch,
                                 shape.seqlen_k, shape.num_heads_kv, head_dim, rows);
  }
};

}  // namespace jax_fa3
