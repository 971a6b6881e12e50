// The table of row intervals (attention/visibility.h) from what a user says of them: segment ids,
// intervals, ends of documents, chunks. Made once, for as many calls as there are layers.
#pragma once

#include "attention/visibility.h"
#include "call/problem.h"
#include "call/status.h"

struct CUstream_st;

namespace jax_fa3 {

// Row i sees what all of the following allow, as far as they are there:
//   query_ids, alone        the run of equal ids around i; 0 sees nothing. An id that comes back
//   after
//                           another makes the plane invalid
//   query_ids, key_ids      the keys with its id. An id below one before it, or behind a padding
//   that
//                           follows an id, makes the plane invalid
//   kv_start, kv_end        keys from kv_start, before kv_end
//   query_ends, key_ends    the keys of the document that i is in, of that the window around its
//                           place, where both ends of a document are aligned
//   chunk                   the keys of the chunk that position i + offset is in
struct VisibilityProblem {
  Shape shape;                                 // batch, num_heads_q, seqlen_q and seqlen_k
  const std::int32_t* query_ids = nullptr;     // [b, s_q]
  const std::int32_t* key_ids = nullptr;       // [b, s_k]
  const std::int32_t* kv_start = nullptr;      // [b, h, s_q]
  const std::int32_t* kv_end = nullptr;        // [b, h, s_q]
  const std::int32_t* query_ends = nullptr;    // [b, num_ends], from 0 on
  const std::int32_t* key_ends = nullptr;      // [b, num_ends], from 0 on
  const std::int32_t* query_offset = nullptr;  // [b]
  std::int64_t num_ends = 0;                   // documents and one more
  MaskOptions window;                  // of documents; and the offset where there is no array
  std::int32_t chunk = 0;              // keys; 0: none
  std::int32_t* visibility = nullptr;  // [b, h, words]
};

// What the launches need of the values; the message names got and expected.
Status check_visibility(const VisibilityProblem& problem);

// Defined in builds with kernels.
Status launch_visibility(const VisibilityProblem& problem, CUstream_st* stream);

}  // namespace jax_fa3
