// Two launches, each with many thread blocks for a plane.
//
// The first has one for each chunk of rows, or of keys: what every row sees, bounds of every 64
// rows. What depends on rows of other chunks it cannot say; it leaves a summary of its own in the
// workspace.
//
// In the second each block reads all summaries of its plane, and so knows what is true of it. Then
// it finishes some rows, and turns around what they say for as many keys: in a monotone plane the
// rows that see a key begin where ends pass it, and end where begins do, two searches.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "attention/mask.h"
#include "device/launch.cuh"
#include "kernels/visibility/visibility.h"

namespace jax_fa3 {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // of a multiprocessor: with registers for what all searches ask for
constexpr int kRowsOfThread = 4;
constexpr int kRowsAtOnce = kThreads * kRowsOfThread;
constexpr int kThreadsOfBounds = kBoundsRows / kRowsOfThread;
static_assert(kChunkRows % kRowsAtOnce == 0);
constexpr int kKeysOfThread = 2;  // and rows, in the second launch: a warp has 64
constexpr int kKeysOfBlock = kThreads * kKeysOfThread;
static_assert(32 * kKeysOfThread == kBoundsRows);

using View = PlaneView<std::int32_t>;
using Neighbours = int[kRowsOfThread];

struct Params {
  VisibilityProblem problem;
  PlaneLayout layout;
  Chunks chunks;

  __device__ View plane(int number) const {
    return {problem.visibility + std::int64_t(number) * layout.words(), layout};
  }
  __device__ ChunkSummary* summaries(int plane) const {
    return static_cast<ChunkSummary*>(problem.workspace) + std::int64_t(plane) * chunks.count;
  }
};

// The greatest so far of each.
struct Greatest {
  int begin = 0;
  int end = 0;
};
struct GreatestOfChunks {
  Greatest keys;
  int query_id = 0;
  int key_id = 0;
  int rows_end = 0;
};
struct TakeGreater {
  __device__ int operator()(int a, int b) const { return max(a, b); }
  __device__ Greatest operator()(const Greatest& a, const Greatest& b) const {
    return {max(a.begin, b.begin), max(a.end, b.end)};
  }
  __device__ GreatestOfChunks operator()(const GreatestOfChunks& a,
                                         const GreatestOfChunks& b) const {
    return {(*this)(a.keys, b.keys), max(a.query_id, b.query_id), max(a.key_id, b.key_id),
            max(a.rows_end, b.rows_end)};
  }
};

// For a whole thread block: the greatest of `all` and those of the threads before this one. `all`
// takes those of all threads in.
template <class T>
__device__ T greatest_before(const T& own, T& all) {
  using Scan = cub::BlockScan<T, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage storage;
  T before, total;
  __syncthreads();  // whoever read storage last
  Scan(storage).ExclusiveScan(own, before, all, TakeGreater{}, total);
  all = TakeGreater{}(all, total);
  return before;
}

// The first i < count for which holds(k, i, number(k, i)) is false, and false for all behind it;
// `count` if there is none. What a search waits for is memory: it asks for three numbers at a time,
// and all searches go in step, and first ask, then look.
template <int kSearches, class Number, class Holds>
__device__ void partition_points(int (&found)[kSearches], int count, const Number& number,
                                 const Holds& holds) {
#pragma unroll
  for (int k = 0; k < kSearches; ++k) found[k] = 0;
  if (count <= 0) return;
  for (int step = 1 << ((31 - __clz(count)) & ~1); step > 0; step /= 4) {
    int numbers[kSearches][3];
#pragma unroll
    for (int k = 0; k < kSearches; ++k) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        numbers[k][i] = number(k, min(found[k] + (i + 1) * step, count) - 1);
      }
    }
#pragma unroll
    for (int k = 0; k < kSearches; ++k) {
      int steps = 0;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const int end = found[k] + (i + 1) * step;
        steps += (end <= count) & holds(k, end - 1, numbers[k][i]);
      }
      found[k] += steps * step;
    }
  }
}

// numbers[first] and those behind it; in place of what is behind the last, the last.
__device__ void load(const std::int32_t* numbers, int first, int count, Neighbours& loaded) {
  static_assert(sizeof(Neighbours) == sizeof(int4));
  const bool aligned = reinterpret_cast<std::uintptr_t>(numbers + first) % sizeof(int4) == 0;
  if (aligned && first + kRowsOfThread <= count) {
    const int4 four = *reinterpret_cast<const int4*>(numbers + first);
    loaded[0] = four.x, loaded[1] = four.y, loaded[2] = four.z, loaded[3] = four.w;
    return;
  }
#pragma unroll
  for (int k = 0; k < kRowsOfThread; ++k) loaded[k] = numbers[min(first + k, count - 1)];
}

// Puts two intervals, of which the second may be behind the last.
__device__ void store(Interval* pair, const Interval& first, const Interval& second) {
  *reinterpret_cast<int4*>(pair) = {first.begin, first.end, second.begin, second.end};
}

// ---- ids

// The ids of a thread's neighbours, those behind the last like it, and the one before them, which
// is another if there is none.
struct Ids {
  int previous;
  Neighbours own;

  __device__ Ids(const std::int32_t* ids, int first, int count) {
    load(ids, first, count, own);
    previous = first > 0 ? ids[min(first, count) - 1] : ~own[0];
  }
  __device__ int before(int k) const { return k > 0 ? own[max(k - 1, 0)] : previous; }
  __device__ bool begins(int k) const { return own[k] != before(k); }
};

// What there is to say of the ids [begin, end) among others, for a whole thread block: of each
// thread a part.
__device__ ChunkIds look_at(const std::int32_t* ids, int begin, int end) {
  ChunkIds all;
  for (int base = begin; base < end; base += kRowsAtOnce) {
    const int first = base + threadIdx.x * kRowsOfThread;
    const Ids here(ids, first, end);
    int greatest = 0;
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) greatest = max(greatest, here.own[k]);
    greatest = greatest_before(greatest, all.greatest);
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      const int id = here.own[k];
      if (id < 0) all.flags |= ChunkIds::kNegative;
      if (id <= 0 || !here.begins(k)) continue;
      if (id <= greatest) all.flags |= ChunkIds::kFalls;
      if (here.before(k) == 0) {
        all.flags |= ChunkIds::kBehindZero | (greatest > 0 ? ChunkIds::kGap : 0);
      }
      all.least = min(all.least, static_cast<std::uint32_t>(id));
      greatest = max(greatest, id);
    }
  }
  return all;
}

// The flags of a chunk's ids if `greatest` is that of those before the chunk.
__device__ int flags_behind(const ChunkIds& ids, int greatest) {
  const bool falls = ids.least <= static_cast<std::uint32_t>(greatest);
  const bool gap = (ids.flags & ChunkIds::kBehindZero) && greatest > 0;
  return ids.flags | (falls ? ChunkIds::kFalls : 0) | (gap ? ChunkIds::kGap : 0);
}

// Whether an id begins more than one run, for a whole thread block. Those that begin runs go into a
// hash table; if it is too small for them, a part of them at a time, by the first bits of the hash.
__device__ bool come_back(const std::int32_t* ids, int count) {
  constexpr unsigned kSlots = 4096;
  __shared__ int table[kSlots];
  for (int part_bits = 0;; part_bits += 2) {
    bool full = false;
    for (unsigned part = 0; part < 1u << part_bits && !full; ++part) {
      for (unsigned slot = threadIdx.x; slot < kSlots; slot += kThreads) table[slot] = 0;
      __syncthreads();
      bool twice = false;
      for (int base = 0; base < count && !twice && !full; base += kRowsAtOnce) {
        const Ids here(ids, base + threadIdx.x * kRowsOfThread, count);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) {
          const int id = here.own[k];
          if (id == 0 || !here.begins(k)) continue;
          const unsigned hash = id * 0x9E3779B1u;  // an odd factor: no two ids share one
          if (part_bits > 0 && hash >> (32 - part_bits) != part) continue;
          bool placed = false;
          for (unsigned i = 0; i < kSlots && !placed; ++i) {
            const int there = atomicCAS(&table[((hash >> 8) + i) % kSlots], 0, id);
            twice |= there == id;
            placed = there == 0 || there == id;
          }
          full |= !placed;
        }
      }
      if (__syncthreads_or(twice)) return true;
      full = __syncthreads_or(full);
    }
    if (!full) return false;
  }
}

// A place where an id is that is not 0; `count` if there is none. It tells zeros in front of the
// ids from those behind them. For a whole thread block.
__device__ int place_of_an_id(const std::int32_t* ids, int count) {
  __shared__ int place;
  if (threadIdx.x == 0) place = count;
  bool found = false;
  for (int base = 0; base < count && !found; base += kRowsAtOnce) {
    const int first = base + threadIdx.x * kRowsOfThread;
    Neighbours id;
    load(ids, min(first, count - 1), count, id);
    int own = count;
#pragma unroll
    for (int k = kRowsOfThread - 1; k >= 0; --k) {
      if (first + k < count && id[k] != 0) own = first + k;
    }
    found = __syncthreads_or(own < count);
    if (own < count) atomicMin(&place, own);
  }
  __syncthreads();
  return place;
}

// The runs of equal ids that a thread's rows are in, for a whole warp, which has neighbours.
//
// Only the runs of the warp's first and last row can go on outside. Where an id has one run, a row
// is in it if it has that id, and its end is found by asking for ids ever closer to it: half of the
// warp looks back, the other half ahead. Of an id that has more than one, which is 0 or makes the
// plane invalid, nobody asks for the run.
__device__ void find_runs(const std::int32_t* ids, int count, const Neighbours& row,
                          const Neighbours& id, Neighbours& begin, Neighbours& end) {
  constexpr int kHalf = 16, kLast = kRowsOfThread - 1;
  const int lane = threadIdx.x % 32;
  const bool ahead = lane >= kHalf;
  const int edge = __shfl_sync(~0u, ahead ? row[kLast] : row[0], ahead ? 31 : 0);
  const int edge_id = __shfl_sync(~0u, ahead ? id[kLast] : id[0], ahead ? 31 : 0);
  int low = 0, high = ahead ? count - 1 - edge : edge;  // how many more rows the run has
  while (__any_sync(~0u, low < high)) {
    const int step = ceil_div(high - low, kHalf);
    const int distance = low + lane % kHalf * step;
    const bool same =
        distance < high && ids[ahead ? edge + 1 + distance : edge - 1 - distance] == edge_id;
    const int many = __popc(__ballot_sync(~0u, same) >> (ahead ? kHalf : 0) & 0xffff);
    if (many < kHalf) high = min(high, low + many * step);
    if (many > 0) low += (many - 1) * step + 1;
  }
  const int warp_begin = __shfl_sync(~0u, edge - low, 0);
  const int warp_end = __shfl_sync(~0u, edge + 1 + low, 31);

  const int previous = __shfl_up_sync(~0u, id[kLast], 1);
  const int next = __shfl_down_sync(~0u, id[0], 1);
  const auto begins = [&](int k) {
    return k > 0 ? id[k] != id[max(k - 1, 0)] : lane > 0 && id[0] != previous;
  };
  const auto ends = [&](int k) {
    return k < kLast ? id[k] != id[min(k + 1, kLast)] : lane < 31 && id[kLast] != next;
  };
  int latest = lane == 0 ? warp_begin : 0, soonest = lane == 31 ? warp_end : count;
#pragma unroll
  for (int k = 0; k < kRowsOfThread; ++k) {
    if (begins(k)) latest = max(latest, row[k]);
    if (ends(k)) soonest = min(soonest, row[k] + 1);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    latest = max(latest, __shfl_up_sync(~0u, latest, step));
    soonest = min(soonest, __shfl_down_sync(~0u, soonest, step));
  }
  latest = __shfl_up_sync(~0u, latest, 1);
  soonest = __shfl_down_sync(~0u, soonest, 1);
  if (lane == 0) latest = warp_begin;
  if (lane == 31) soonest = warp_end;
#pragma unroll
  for (int k = 0; k < kRowsOfThread; ++k) begin[k] = latest = begins(k) ? row[k] : latest;
#pragma unroll
  for (int k = kLast; k >= 0; --k) end[k] = soonest = ends(k) ? row[k] + 1 : soonest;
}

// ---- rows

// What the arguments say of rows, of one plane.
struct Sources {
  const VisibilityProblem& problem;
  int batch;
  std::int64_t plane;
  int id_place;  // of place_of_an_id among the keys' ids

  // Of a thread's neighbours, those behind the last row like it. For a whole warp.
  __device__ void of(int first, Interval (&keys)[kRowsOfThread]) const {
    const int seqlen_q = problem.shape.seqlen_q, seqlen_k = problem.shape.seqlen_k;
    Neighbours row, begin, end;
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      row[k] = min(first + k, seqlen_q - 1);
      keys[k] = {0, seqlen_k};
    }
    const auto narrow = [&](int k, int begin, int end) {
      keys[k].begin = max(keys[k].begin, begin);
      keys[k].end = min(keys[k].end, end);
    };
    if (problem.query_ids != nullptr) {
      const auto* const ids = problem.query_ids + std::int64_t(batch) * seqlen_q;
      Neighbours id;
      load(ids, row[0], seqlen_q, id);
      if (problem.key_ids == nullptr) {
        find_runs(ids, seqlen_q, row, id, begin, end);
      } else {
        find_keys(id, begin, end);
      }
#pragma unroll
      for (int k = 0; k < kRowsOfThread; ++k) narrow(k, begin[k], id[k] == 0 ? 0 : end[k]);
    }
    if (problem.query_ends != nullptr) {
      const int num_ends = problem.num_ends;
      const auto* const queries = problem.query_ends + std::int64_t(batch) * num_ends;
      const auto* const ends = problem.key_ends + std::int64_t(batch) * num_ends;
      Neighbours next;  // document
      partition_points(
          next, num_ends, [&](int, int i) { return queries[i]; },
          [&](int k, int, int end) { return end <= row[k]; });
#pragma unroll
      for (int k = 0; k < kRowsOfThread; ++k) {
        const bool exists = next[k] > 0 && next[k] < num_ends;
        const int last = exists ? next[k] : 0;
        begin[k] = clamp_to(ends[exists ? last - 1 : 0], 0, seqlen_k);
        end[k] = clamp_to(ends[last], 0, seqlen_k);
        // Where the row stands among the keys if the ends of both meet.
        const int position = row[k] + end[k] - clamp_to(queries[last], 0, seqlen_q);
        narrow(k, max(begin[k], position - problem.window.window_left),
               exists ? min(end[k], position + problem.window.window_right + 1) : 0);
      }
    }
    const std::int64_t place = plane * seqlen_q;
    if (problem.kv_start != nullptr) {
      load(problem.kv_start + place, row[0], seqlen_q, begin);
#pragma unroll
      for (int k = 0; k < kRowsOfThread; ++k) narrow(k, begin[k], seqlen_k);
    }
    if (problem.kv_end != nullptr) {
      load(problem.kv_end + place, row[0], seqlen_q, end);
#pragma unroll
      for (int k = 0; k < kRowsOfThread; ++k) narrow(k, 0, end[k]);
    }
    if (problem.chunk > 0) {
      const int offset =
          clamp_to(problem.query_offset ? problem.query_offset[batch] : problem.window.query_offset,
                   -kMaxSeqlen, kMaxSeqlen);
#pragma unroll
      for (int k = 0; k < kRowsOfThread; ++k) {
        const int position = row[k] + offset;
        const int beyond = position % problem.chunk;
        const int chunk = position - beyond - (beyond < 0 ? problem.chunk : 0);
        narrow(k, chunk, chunk + problem.chunk);
      }
    }
  }

 private:
  // The keys that have the rows' ids. Those of ids are in order but for zeros, which are before all
  // ids or behind them all.
  __device__ void find_keys(const Neighbours& id, Neighbours& begin, Neighbours& end) const {
    const int count = problem.shape.seqlen_k;
    const auto* const ids = problem.key_ids + std::int64_t(batch) * count;
    int found[2 * kRowsOfThread];
    partition_points(
        found, count, [&](int, int i) { return ids[i]; },
        [&](int k, int i, int key_id) {
          const bool is_before = k % 2 == 0 ? key_id < id[k / 2] : key_id <= id[k / 2];
          return key_id == 0 ? i < id_place : is_before;
        });
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) begin[k] = found[2 * k], end[k] = found[2 * k + 1];
  }
};

__device__ bool sees(const Interval& interval) { return interval.begin < interval.end; }

__device__ Bounds bounds_of(const Interval& interval) {
  if (!sees(interval)) return {kNone, kNone, 0, 0};
  return {interval.begin, interval.begin, interval.end, interval.end};
}

// Of `kCount` neighbouring threads.
template <int kCount>
__device__ void add_neighbours(Bounds& bounds) {
#pragma unroll
  for (int step = kCount / 2; step > 0; step /= 2) {
    bounds.add({__shfl_xor_sync(~0u, bounds.least_begin, step),
                __shfl_xor_sync(~0u, bounds.greatest_begin, step),
                __shfl_xor_sync(~0u, bounds.least_end, step),
                __shfl_xor_sync(~0u, bounds.greatest_end, step)});
  }
}

// Makes rows [begin, end) of a plane, for a whole thread block. A row that sees nothing has the
// greatest begin and end of the rows before it from `begin` on. Of what it returns each thread has
// a part.
__device__ ChunkSummary make_rows(const Sources& sources, const View& plane, int begin, int end) {
  ChunkSummary summary;
  Greatest all;
  for (int base = begin; base < end; base += kRowsAtOnce) {
    const int first = base + threadIdx.x * kRowsOfThread;
    Interval keys[kRowsOfThread];
    sources.of(first, keys);
    Greatest greatest;
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      if (first + k >= end || !sees(keys[k])) keys[k] = {0, 0};
      greatest = TakeGreater{}(greatest, {keys[k].begin, keys[k].end});
    }
    greatest = greatest_before(greatest, all);
    Bounds bounds = Bounds::none();
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      if (first + k >= end) continue;
      bounds.add(bounds_of(keys[k]));
      if (!sees(keys[k])) {
        keys[k] = {greatest.begin, ~greatest.end};
        continue;
      }
      summary.falls |= keys[k].begin < greatest.begin || keys[k].end < greatest.end;
      summary.least.begin = min(summary.least.begin, keys[k].begin);
      summary.least.end = min(summary.least.end, keys[k].end);
      summary.rows_end = first + k + 1;
      greatest = TakeGreater{}(greatest, {keys[k].begin, keys[k].end});
    }
#pragma unroll
    for (int k = 0; k < kRowsOfThread; k += 2) {  // an odd number of rows has a place more
      if (first + k < end) store(plane.rows() + first + k, keys[k], keys[k + 1]);
    }
    add_neighbours<kThreadsOfBounds>(bounds);
    if (threadIdx.x % kThreadsOfBounds == 0 && first < end) {
      plane.row_bounds()[first / kBoundsRows] = bounds;
    }
  }
  summary.greatest = {all.begin, all.end};
  return summary;
}

// Adds the ids of a warp's threads to `all`, in shared memory.
__device__ void add_ids(ChunkIds& all, const ChunkIds& own) {
  const auto least = __reduce_min_sync(~0u, own.least);
  const int flags = __reduce_or_sync(~0u, own.flags);
  if (threadIdx.x % 32 != 0) return;
  atomicMin(&all.least, least);
  atomicMax(&all.greatest, own.greatest);
  atomicOr(&all.flags, flags);
}

__global__ void __launch_bounds__(kThreads, kBlocks) rows_kernel(const Params p) {
  const int seqlen_q = p.layout.seqlen_q, seqlen_k = p.layout.seqlen_k;
  const int plane = blockIdx.x / p.chunks.count, chunk = blockIdx.x % p.chunks.count;
  const int batch = plane / p.problem.shape.num_heads_q;
  const auto* const query_ids = p.problem.query_ids;
  const auto* const key_ids = p.problem.key_ids;
  const int begin = chunk * p.chunks.rows;
  const int rows_end = min(begin + p.chunks.rows, seqlen_q);
  const int keys_end = min(begin + p.chunks.rows, seqlen_k);

  __shared__ ChunkSummary all;
  if (threadIdx.x == 0) all = ChunkSummary{};
  __syncthreads();
  Sources sources{p.problem, batch, plane, 0};
  if (query_ids != nullptr) {
    add_ids(all.query_ids, look_at(query_ids + std::int64_t(batch) * seqlen_q, begin, rows_end));
  }
  if (key_ids != nullptr) {
    const auto* const ids = key_ids + std::int64_t(batch) * seqlen_k;
    add_ids(all.key_ids, look_at(ids, begin, keys_end));
    sources.id_place = place_of_an_id(ids, seqlen_k);
  }
  const ChunkSummary own = make_rows(sources, p.plane(plane), begin, rows_end);
  const int falls = __any_sync(~0u, own.falls);
  const int least_begin = __reduce_min_sync(~0u, own.least.begin);
  const int least_end = __reduce_min_sync(~0u, own.least.end);
  const int last = __reduce_max_sync(~0u, own.rows_end);
  if (threadIdx.x % 32 == 0) {
    atomicOr(&all.falls, falls);
    atomicMin(&all.least.begin, least_begin);
    atomicMin(&all.least.end, least_end);
    atomicMax(&all.rows_end, last);
  }
  if (threadIdx.x == 0) all.greatest = own.greatest;
  __syncthreads();
  if (threadIdx.x == 0) p.summaries(plane)[chunk] = all;
}

// ---- keys

// What is true of a plane.
struct Truth {
  bool valid;
  bool monotone;
  int rows_end;
  int keys_end;
};

// The truth of a plane, from its chunks, for a whole thread block. before[i] becomes what is
// greatest in the chunks before the i-th one; there is one `before` more than chunks.
__device__ Truth find_truth(const Params& p, int plane, Greatest* before) {
  const ChunkSummary* const summaries = p.summaries(plane);
  GreatestOfChunks all;
  bool falls = false;
  int query_flags = 0, key_flags = 0;
  for (int base = 0; base < p.chunks.count; base += kThreads) {
    const int i = base + threadIdx.x;
    ChunkSummary own;
    if (i < p.chunks.count) own = summaries[i];
    const GreatestOfChunks of_own{{own.greatest.begin, own.greatest.end},
                                  own.query_ids.greatest,
                                  own.key_ids.greatest,
                                  own.rows_end};
    const GreatestOfChunks greatest = greatest_before(of_own, all);
    if (i < p.chunks.count) before[i] = greatest.keys;
    falls |=
        own.falls || own.least.begin < greatest.keys.begin || own.least.end < greatest.keys.end;
    query_flags |= flags_behind(own.query_ids, greatest.query_id);
    key_flags |= flags_behind(own.key_ids, greatest.key_id);
  }
  if (threadIdx.x == 0) before[p.chunks.count] = all.keys;

  // With ids of both, each of them must rise. Ids of rows alone may be in any order.
  constexpr int kDisorder = ChunkIds::kFalls | ChunkIds::kGap;
  const bool of_both = p.problem.key_ids != nullptr;
  const int flags = query_flags | key_flags;
  bool valid = !__syncthreads_or(flags & (ChunkIds::kNegative | (of_both ? kDisorder : 0)));
  if (__syncthreads_or(flags & ChunkIds::kFalls) && valid) {
    const int batch = plane / p.problem.shape.num_heads_q, count = p.layout.seqlen_q;
    valid = !come_back(p.problem.query_ids + std::int64_t(batch) * count, count);
  }
  falls = __syncthreads_or(falls);
  if (!valid) return {false, true, p.layout.seqlen_q, p.layout.seqlen_k};
  return {true, !falls, all.rows_end, all.keys.end};
}

// Of a row that sees nothing, what is greatest in all rows before it: until now it is that of its
// chunk. Other blocks may read the row before or after this; either will do.
__device__ Interval finished(const Interval& row, const Greatest& before) {
  if (row.end >= 0) return row;
  return {max(row.begin, before.begin), ~max(~row.end, before.end)};
}

// The rows that see each of a thread's keys, of a monotone plane: a search for where they begin,
// and one for where they end. Keys behind the last one are like others.
__device__ void find_rows(const Params& p, const View& plane, const Greatest* before, int first_key,
                          Interval (&seen_by)[kKeysOfThread]) {
  constexpr int kSearches = 2 * kKeysOfThread;
  const auto key = [&](int k) { return first_key + k / 2; };
  const auto end_or_begin = [](int k, const auto& x) { return k % 2 == 0 ? x.end : x.begin; };
  // First the chunk where the greatest so far passes the key. What is before the chunk does not, so
  // that in it the chunk's own numbers will do.
  int start[kSearches], found[kSearches];
  partition_points(
      start, p.chunks.count, [&](int k, int i) { return end_or_begin(k, before[i + 1]); },
      [&](int k, int, int edge) { return edge <= key(k); });
#pragma unroll
  for (int k = 0; k < kSearches; ++k) start[k] = min(start[k] * p.chunks.rows, p.layout.seqlen_q);
  // If no row of a chunk but the last passes, the last one does.
  const Interval* const rows = plane.rows();
  partition_points(
      found, p.chunks.rows - 1,
      [&](int k, int i) { return end_or_begin(k, rows[min(start[k] + i, p.layout.seqlen_q - 1)]); },
      [&](int k, int i, int edge) {
        return (start[k] + i < p.layout.seqlen_q) & ((edge < 0 ? ~edge : edge) <= key(k));
      });
#pragma unroll
  for (int k = 0; k < kKeysOfThread; ++k) {
    seen_by[k] = {start[2 * k] + found[2 * k], start[2 * k + 1] + found[2 * k + 1]};
    if (!sees(seen_by[k])) seen_by[k] = {0, 0};
  }
}

// Bounds of the groups of rows that reach into keys [begin, end). Of each thread of a warp a part.
__device__ Bounds find_groups(const View& plane, int begin, int end) {
  const int seqlen_q = plane.layout.seqlen_q;
  const int groups = ceil_div(seqlen_q, kBoundsRows);
  Bounds bounds{kNone, kNone, 0, 0};
  for (int i = threadIdx.x % 32; i < groups; i += 32) {
    const Bounds& rows = plane.row_bounds()[i];
    if (rows.least_begin >= end || rows.greatest_end <= begin) continue;
    bounds.least_begin = min(bounds.least_begin, i * kBoundsRows);
    bounds.greatest_end = max(bounds.greatest_end, min((i + 1) * kBoundsRows, seqlen_q));
  }
  return bounds;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    keys_kernel(const Params p, unsigned blocks_of_plane) {
  const int seqlen_q = p.layout.seqlen_q, seqlen_k = p.layout.seqlen_k;
  const View plane = p.plane(blockIdx.x / blocks_of_plane);
  const int first_of_block = blockIdx.x % blocks_of_plane * kKeysOfBlock;
  const int first = first_of_block + threadIdx.x * kKeysOfThread;

  __shared__ Greatest before[kMostChunks + 1];
  const Truth truth = find_truth(p, blockIdx.x / blocks_of_plane, before);
  if (first == 0) {
    plane.summary() = {(truth.valid ? Plane::kValid : 0) | (truth.monotone ? Plane::kMonotone : 0),
                       truth.rows_end, truth.keys_end, 0};
  }
  const int group = first / kBoundsRows, lane = threadIdx.x % 32;
  if (first < seqlen_q) {
    Interval* const rows = plane.rows() + first;
    if (truth.valid) {
      const Interval was[] = {rows[0], rows[1]};  // an odd number of rows has a place more
      if (was[0].end < 0 || was[1].end < 0) {
        const Greatest& greatest = before[first / p.chunks.rows];
        store(rows, finished(was[0], greatest), finished(was[1], greatest));
      }
    } else {
      store(rows, {0, seqlen_k}, {0, first + 1 < seqlen_q ? seqlen_k : 0});
      if (lane == 0) plane.row_bounds()[group] = {0, 0, seqlen_k, seqlen_k};
    }
  }

  const int group_begin = group * kBoundsRows, group_end = min(group_begin + kBoundsRows, seqlen_k);
  if (group_begin >= seqlen_k) return;
  Interval seen_by[kKeysOfThread] = {{0, 0}, {0, 0}};
  Bounds bounds = Bounds::none();
  if (truth.monotone) {
    if (truth.valid) find_rows(p, plane, before, first, seen_by);
#pragma unroll
    for (int k = 0; k < kKeysOfThread; ++k) {
      if (!truth.valid) seen_by[k] = {0, seqlen_q};
      if (first + k < seqlen_k) bounds.add(bounds_of(seen_by[k]));
      if (first + k >= seqlen_k) seen_by[k] = {0, 0};
    }
  } else {
    bounds = find_groups(plane, group_begin, group_end);
  }
  if (first < seqlen_k) store(plane.keys() + first, seen_by[0], seen_by[1]);
  add_neighbours<32>(bounds);
  if (lane == 0) plane.key_bounds()[group] = bounds;
}

}  // namespace

Status launch_visibility(const VisibilityProblem& problem, cudaStream_t stream) {
  const Shape& s = problem.shape;
  const auto planes = static_cast<unsigned>(s.batch * s.num_heads_q);
  if (planes == 0) return {};
  const PlaneLayout layout{static_cast<int>(s.seqlen_q), static_cast<int>(s.seqlen_k)};
  const Params p{problem, layout, chunks_of(s)};
  JFA_CHECK_OK(launch_kernel("visibility rows_kernel", rows_kernel, dim3(planes * p.chunks.count),
                             kThreads, 0, stream, p));
  const auto blocks =
      static_cast<unsigned>(ceil_div<std::int64_t>(std::max(s.seqlen_q, s.seqlen_k), kKeysOfBlock));
  return launch_kernel("visibility keys_kernel", keys_kernel, dim3(planes * blocks), kThreads, 0,
                       stream, p, blocks);
}

}  // namespace jax_fa3
