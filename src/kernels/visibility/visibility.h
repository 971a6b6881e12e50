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
//                           after another makes the plane invalid
//   query_ids, key_ids      the keys with its id. An id below one before it, or behind a padding
//                           that follows an id, makes the plane invalid
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
  std::int64_t num_ends = -1;                  // documents and one more; -1: no ends
  MaskOptions window;                  // of documents; and the offset where there is no array
  std::int32_t chunk = 0;              // keys; 0: none
  std::int32_t* visibility = nullptr;  // [b, h, words]
  void* workspace = nullptr;           // visibility_workspace_bytes
  std::int64_t workspace_bytes = 0;    // that it has
};

// A plane's rows, and its keys, in equal chunks: each is one thread block's to begin with.
struct Chunks {
  int rows;
  int count;
};
constexpr int kChunkRows = 1024;   // at least
constexpr int kMostChunks = 1024;  // of a plane
Chunks chunks_of(const Shape& shape);

// What the ids of a chunk mean for those before and behind it.
struct ChunkIds {
  static constexpr std::int32_t kNegative = 1;
  static constexpr std::int32_t kFalls = 2;       // one begins a run but is not above all before it
  static constexpr std::int32_t kBehindZero = 4;  // one follows a 0
  static constexpr std::int32_t kGap = 8;         // and there is one before the 0

  std::uint32_t least = ~0u;  // above 0, of those that begin runs
  std::int32_t greatest = 0;
  std::int32_t flags = 0;
  std::int32_t unused = 0;
};

// What the launch for rows leaves of a chunk, in the workspace.
struct alignas(16) ChunkSummary {
  Interval least{kNone, kNone};  // begin, and end, of rows that see something
  Interval greatest{0, 0};
  ChunkIds query_ids;
  ChunkIds key_ids;
  std::int32_t rows_end = 0;
  std::int32_t falls = 0;  // a begin or an end, from a row to a later one
  std::int32_t unused[2] = {0, 0};
};

// [b, h, chunks] summaries. jax_fa3/visibility/layout.py has the same number.
std::int64_t visibility_workspace_bytes(const Shape& shape);

// What the launches need of the values; the message names got and expected.
Status check_visibility(const VisibilityProblem& problem);

// Defined in builds with kernels.
Status launch_visibility(const VisibilityProblem& problem, CUstream_st* stream);

}  // namespace jax_fa3
