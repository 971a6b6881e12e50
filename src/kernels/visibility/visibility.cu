// Two launches. The first has a thread block for each plane, which walks its rows: what each one
// sees, whether begins and ends rise, bounds of every 64 rows. The second turns that around, all
// keys at once: in a monotone plane the rows that see a key begin where ends pass it, and end where
// begins do, two binary searches.
#include <cub/block/block_scan.cuh>

#include "attention/mask.h"
#include "device/launch.cuh"
#include "kernels/visibility/visibility.h"

namespace jax_fa3 {
namespace {

constexpr int kRowThreads = 512;
constexpr int kRowsOfThread = 16;
constexpr int kRowsAtOnce = kRowThreads * kRowsOfThread;
constexpr int kThreadsOfBounds = kBoundsRows / kRowsOfThread;
constexpr int kKeyThreads = 256;
constexpr int kKeysOfThread = 2;  // a warp has 64
static_assert(32 * kKeysOfThread == kBoundsRows);

using View = PlaneView<std::int32_t>;

struct Params {
  VisibilityProblem problem;
  PlaneLayout layout;

  __device__ View plane(int number) const {
    return {problem.visibility + std::int64_t(number) * layout.words(), layout};
  }
};

// Two running maxima.
struct Largest {
  int first = 0;
  int second = 0;
};
struct TakeLarger {
  __device__ Largest operator()(const Largest& a, const Largest& b) const {
    return {max(a.first, b.first), max(a.second, b.second)};
  }
};
using Scan = cub::BlockScan<Largest, kRowThreads>;
using Rows = Largest[kRowsOfThread];

// For all i < count, kRowsOfThread neighbours in each thread: own = of(first) for the neighbours
// from `first` on, as far as there are, and visit(first, own, before), where `before` has for each
// the largest of all own ones before it. For a whole thread block; returns the largest of all.
//
// The thread's neighbours go through each stage together: one after another their loads would take
// many times as long.
template <class Of, class Visit>
__device__ Largest scan(int count, const Of& of, const Visit& visit) {
  __shared__ typename Scan::TempStorage storage;
  Largest all;
  for (int base = 0; base < count; base += kRowsAtOnce) {
    const int first = base + threadIdx.x * kRowsOfThread;
    Rows own, before;
    Largest total;
    of(first, own);
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      if (first + k >= count) own[k] = Largest{};
    }
    Scan(storage).ExclusiveScan(own, before, all, TakeLarger{}, total);
    all = TakeLarger{}(all, total);
    visit(first, own, before);
    __syncthreads();  // the next round writes storage again
  }
  return all;
}

// Of `count` ascending numbers the first that are greater than each x, all searches in step;
// number(k, i) says the i-th one for x[k].
template <int kSearches, class Number>
__device__ void first_greater(int (&found)[kSearches], int count, const int (&x)[kSearches],
                              const Number& number) {
#pragma unroll
  for (int k = 0; k < kSearches; ++k) found[k] = 0;
  for (int step = count > 0 ? 1 << (31 - __clz(count)) : 0; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < kSearches; ++k) {
      const int end = found[k] + step;
      if (end <= count && number(k, end - 1) <= x[k]) found[k] = end;
    }
  }
}

// The ids of a thread's neighbours and of the one before them, which is another if there is none.
struct Ids {
  int of[kRowsOfThread + 1];

  __device__ Ids(const std::int32_t* ids, int count, int first) {
#pragma unroll
    for (int k = 0; k <= kRowsOfThread; ++k) of[k] = ids[clamp_to(first + k - 1, 0, count - 1)];
    if (first == 0) of[0] = ~of[1];
  }
  __device__ int own(int k) const { return of[k + 1]; }
  __device__ bool begins(int k) const { return of[k + 1] != of[k]; }
};

// Runs of equal ids: of each row where its run begins, and of a run's first row where it ends, in
// the place of the plane that is for keys later. Returns whether no id comes back after another.
__device__ bool find_runs(const std::int32_t* ids, int count, Interval* runs) {
  bool negative = false, falls = false;
  const Largest last = scan(
      count,
      [&](int first, Rows& own) {
        const Ids here(ids, count, first);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) {
          own[k] = {here.begins(k) ? first + k : 0, max(here.own(k), 0)};
        }
      },
      [&](int first, const Rows& own, const Rows& before) {
        const Ids here(ids, count, first);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) {
          const int i = first + k;
          if (i >= count) continue;
          negative |= here.own(k) < 0;
          if (here.begins(k) && i > 0) runs[before[k].first].end = i;
          if (here.begins(k) && here.own(k) > 0) falls |= here.own(k) <= before[k].second;
          runs[i].begin = here.begins(k) ? i : before[k].first;
        }
      });
  if (threadIdx.x == 0) runs[last.first].end = count;
  if (__syncthreads_or(negative)) return false;
  if (!__syncthreads_or(falls)) return true;
  // Ids that do not rise may have been there before: each run looks at all runs before it.
  bool returns = false;
  for (int i = threadIdx.x; i < count && !returns; i += kRowThreads) {
    if (ids[i] == 0 || runs[i].begin != i) continue;
    for (int run = 0; run < i && !returns; run = runs[run].end) returns = ids[run] == ids[i];
  }
  return !__syncthreads_or(returns);
}

// Whether ids rise, 0 before and behind them; `end` becomes where the last one ends.
__device__ bool rise(const std::int32_t* ids, int count, int* end) {
  __shared__ int shared_end;
  if (threadIdx.x == 0) shared_end = 0;
  __syncthreads();
  bool wrong = false;
  int last = 0;
  scan(
      count,
      [&](int first, Rows& own) {
        const Ids here(ids, count, first);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) own[k] = {max(here.own(k), 0), 0};
      },
      [&](int first, const Rows&, const Rows& before) {
        const Ids here(ids, count, first);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) {
          if (first + k >= count || here.own(k) == 0) continue;
          wrong |= here.own(k) < before[k].first;
          wrong |= before[k].first > 0 && here.of[k] == 0;
          last = first + k + 1;
        }
      });
  atomicMax(&shared_end, last);
  wrong = __syncthreads_or(wrong);
  *end = shared_end;
  __syncthreads();
  return !wrong;
}

// What the arguments say of rows, of one plane.
struct Sources {
  const VisibilityProblem& problem;
  int batch;
  std::int64_t plane;
  const Interval* runs;  // of find_runs
  int keys_end;          // of rise

  // Of a thread's neighbours, those behind the last row like it.
  __device__ void of(int first, Interval (&keys)[kRowsOfThread]) const {
    const int seqlen_q = problem.shape.seqlen_q, seqlen_k = problem.shape.seqlen_k;
    int row[kRowsOfThread], begin[kRowsOfThread], end[kRowsOfThread];
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
      int id[kRowsOfThread];
#pragma unroll
      for (int k = 0; k < kRowsOfThread; ++k) {
        id[k] = problem.query_ids[std::int64_t(batch) * seqlen_q + row[k]];
      }
      if (problem.key_ids == nullptr) {
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) begin[k] = runs[row[k]].begin;
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) end[k] = runs[begin[k]].end;
      } else {
        const auto* const ids = problem.key_ids + std::int64_t(batch) * seqlen_k;
        const auto number = [&](int, int i) { return ids[i]; };
        first_greater(end, keys_end, id, number);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) --id[k];
        first_greater(begin, keys_end, id, number);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) ++id[k];
      }
#pragma unroll
      for (int k = 0; k < kRowsOfThread; ++k) narrow(k, begin[k], id[k] == 0 ? 0 : end[k]);
    }
    if (problem.query_ends != nullptr) {
      const int num_ends = problem.num_ends;
      const auto* const queries = problem.query_ends + std::int64_t(batch) * num_ends;
      const auto* const ends = problem.key_ends + std::int64_t(batch) * num_ends;
      int next[kRowsOfThread];  // document
      first_greater(next, num_ends, row, [&](int, int i) { return queries[i]; });
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
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      if (problem.kv_start != nullptr) narrow(k, problem.kv_start[place + row[k]], seqlen_k);
      if (problem.kv_end != nullptr) narrow(k, 0, problem.kv_end[place + row[k]]);
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
};

__device__ Bounds bounds_of(const Interval& interval) {
  if (interval.begin >= interval.end) return {kNone, kNone, 0, 0};
  return {interval.begin, interval.begin, interval.end, interval.end};
}

// Of `kThreads` neighbouring threads.
template <int kThreads>
__device__ void add_neighbours(Bounds& bounds) {
#pragma unroll
  for (int step = kThreads / 2; step > 0; step /= 2) {
    bounds.add({__shfl_xor_sync(~0u, bounds.least_begin, step),
                __shfl_xor_sync(~0u, bounds.greatest_begin, step),
                __shfl_xor_sync(~0u, bounds.least_end, step),
                __shfl_xor_sync(~0u, bounds.greatest_end, step)});
  }
}

__global__ void __launch_bounds__(kRowThreads) rows_kernel(const Params p) {
  const int seqlen_q = p.layout.seqlen_q, seqlen_k = p.layout.seqlen_k;
  const View plane = p.plane(blockIdx.x);
  const int batch = blockIdx.x / p.problem.shape.num_heads_q;

  __shared__ int shared_rows_end;
  if (threadIdx.x == 0) shared_rows_end = 0;
  int keys_end = 0;
  bool valid = true;
  if (p.problem.query_ids != nullptr) {
    const auto* const ids = p.problem.query_ids + std::int64_t(batch) * seqlen_q;
    if (p.problem.key_ids == nullptr) {
      valid = find_runs(ids, seqlen_q, plane.keys());
    } else {
      int unused;
      valid = rise(ids, seqlen_q, &unused);
      valid &= rise(p.problem.key_ids + std::int64_t(batch) * seqlen_k, seqlen_k, &keys_end);
    }
  }
  __syncthreads();

  const Sources sources{p.problem, batch, blockIdx.x, plane.keys(), keys_end};
  bool falls = false;
  int rows_end = 0;
  const Largest last = scan(
      seqlen_q,
      [&](int first, Rows& own) {
        Interval keys[kRowsOfThread];
        if (valid) sources.of(first, keys);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) {
          if (!valid) keys[k] = {0, seqlen_k};
          own[k] = keys[k].begin < keys[k].end ? Largest{keys[k].begin, keys[k].end} : Largest{};
        }
      },
      [&](int first, const Rows& own, const Rows& before) {
        Bounds bounds = Bounds::none();
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) {
          if (first + k >= seqlen_q) continue;
          const bool sees = own[k].second > 0;
          const Interval keys{own[k].first, own[k].second};
          plane.rows()[first + k] = sees ? keys : Interval{before[k].first, ~before[k].second};
          bounds.add(bounds_of(keys));
          if (!sees) continue;
          falls |= own[k].first < before[k].first || own[k].second < before[k].second;
          rows_end = first + k + 1;
        }
        add_neighbours<kThreadsOfBounds>(bounds);
        if (threadIdx.x % kThreadsOfBounds == 0 && first < seqlen_q) {
          plane.row_bounds()[first / kBoundsRows] = bounds;
        }
      });
  atomicMax(&shared_rows_end, rows_end);
  falls = __syncthreads_or(falls);
  if (threadIdx.x > 0) return;
  if (seqlen_q % 2 != 0) plane.rows()[seqlen_q] = {0, 0};  // a part is whole groups of four words
  plane.summary() = {(valid ? Plane::kValid : 0) | (falls ? 0 : Plane::kMonotone), shared_rows_end,
                     last.second, 0};
}

__global__ void __launch_bounds__(kKeyThreads)
    keys_kernel(const Params p, unsigned blocks_of_plane) {
  const int seqlen_q = p.layout.seqlen_q, seqlen_k = p.layout.seqlen_k;
  const View plane = p.plane(blockIdx.x / blocks_of_plane);
  const int lane = threadIdx.x % 32;
  const int group = (blockIdx.x % blocks_of_plane * kKeyThreads + threadIdx.x) / 32;
  const int first_key = group * kBoundsRows, end_key = min(first_key + kBoundsRows, seqlen_k);
  if (first_key >= seqlen_k) return;

  const int first_of_thread = first_key + kKeysOfThread * lane;
  const bool monotone = plane.summary().flags & Plane::kMonotone;
  Interval seen_by[kKeysOfThread] = {{0, 0}, {0, 0}};
  Bounds bounds = Bounds::none();
  if (monotone) {
    // A search for where each key's rows begin, and one for where they end.
    const Interval* const rows = plane.rows();
    int keys[2 * kKeysOfThread], found[2 * kKeysOfThread];
#pragma unroll
    for (int i = 0; i < 2 * kKeysOfThread; ++i) keys[i] = first_of_thread + i / 2;
    first_greater(found, seqlen_q, keys, [&](int i, int row) {
      const int edge = i % 2 == 0 ? rows[row].end : rows[row].begin;
      return edge < 0 ? ~edge : edge;
    });
#pragma unroll
    for (int k = 0; k < kKeysOfThread; ++k) {
      if (keys[2 * k] >= seqlen_k) continue;
      if (found[2 * k] < found[2 * k + 1]) seen_by[k] = {found[2 * k], found[2 * k + 1]};
      bounds.add(bounds_of(seen_by[k]));
    }
  } else {
    bounds = {kNone, kNone, 0, 0};
    const int groups = ceil_div(seqlen_q, kBoundsRows);
    for (int i = lane; i < groups; i += 32) {
      const Bounds& rows = plane.row_bounds()[i];
      if (rows.least_begin >= end_key || rows.greatest_end <= first_key) continue;
      bounds.least_begin = min(bounds.least_begin, i * kBoundsRows);
      bounds.greatest_end = max(bounds.greatest_end, min((i + 1) * kBoundsRows, seqlen_q));
    }
  }
  if (first_of_thread < seqlen_k) {  // an odd number of keys has a place more
    *reinterpret_cast<int4*>(plane.keys() + first_of_thread) = {seen_by[0].begin, seen_by[0].end,
                                                                seen_by[1].begin, seen_by[1].end};
  }
  add_neighbours<32>(bounds);
  if (lane == 0) plane.key_bounds()[group] = bounds;
}

}  // namespace

Status launch_visibility(const VisibilityProblem& problem, cudaStream_t stream) {
  const Shape& s = problem.shape;
  const auto planes = static_cast<unsigned>(s.batch * s.num_heads_q);
  if (planes == 0) return {};
  const Params p{problem, {static_cast<int>(s.seqlen_q), static_cast<int>(s.seqlen_k)}};
  JFA_CHECK_OK(launch_kernel("visibility rows_kernel", rows_kernel, dim3(planes), kRowThreads, 0,
                             stream, p));
  const auto blocks =
      static_cast<unsigned>(ceil_div<std::int64_t>(s.seqlen_k, kKeyThreads * kKeysOfThread));
  return launch_kernel("visibility keys_kernel", keys_kernel, dim3(planes * blocks), kKeyThreads, 0,
                       stream, p, blocks);
}

}  // namespace jax_fa3
