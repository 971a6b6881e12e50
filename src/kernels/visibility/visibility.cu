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
constexpr int kRowsOfThread = 4;
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

// Calls visit(i, own, before) for all i < count, kRowsOfThread neighbours in each thread: own =
// of(i), and `before` has the largest of all own ones before it. Then end(first), for what a thread
// made of its neighbours. For a whole thread block; returns the largest of all.
template <class Of, class Visit, class End>
__device__ Largest scan(int count, const Of& of, const Visit& visit, const End& end) {
  __shared__ typename Scan::TempStorage storage;
  Largest all;
  for (int base = 0; base < count; base += kRowsAtOnce) {
    const int first = base + threadIdx.x * kRowsOfThread;
    Largest own[kRowsOfThread], before[kRowsOfThread], total;
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      own[k] = first + k < count ? of(first + k) : Largest{};
    }
    Scan(storage).ExclusiveScan(own, before, all, TakeLarger{}, total);
    all = TakeLarger{}(all, total);
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      if (first + k < count) visit(first + k, own[k], before[k]);
    }
    end(first);
    __syncthreads();  // the next round writes storage again
  }
  return all;
}
template <class Of, class Visit>
__device__ Largest scan(int count, const Of& of, const Visit& visit) {
  return scan(count, of, visit, [](int) {});
}

// The first of `count` ascending numbers that is greater than x; `number` says the i-th one.
template <class Number>
__device__ int first_greater(int count, int x, const Number& number) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (number(middle) > x) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Runs of equal ids: of each row where its run begins, and of a run's first row where it ends, in
// the place of the plane that is for keys later. Returns whether no id comes back after another.
__device__ bool find_runs(const std::int32_t* ids, int count, Interval* runs) {
  bool negative = false, falls = false;
  const auto begins = [&](int i) { return i == 0 || ids[i] != ids[i - 1]; };
  const Largest last = scan(
      count,
      [&](int i) {
        return Largest{begins(i) ? i : 0, max(ids[i], 0)};
      },
      [&](int i, const Largest& own, const Largest& before) {
        negative |= ids[i] < 0;
        if (begins(i) && i > 0) runs[before.first].end = i;
        if (begins(i) && ids[i] > 0) falls |= ids[i] <= before.second;
        runs[i].begin = begins(i) ? i : before.first;
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
      [&](int i) {
        return Largest{max(ids[i], 0), 0};
      },
      [&](int i, const Largest&, const Largest& before) {
        if (ids[i] == 0) return;
        wrong |= ids[i] < before.first;
        wrong |= before.first > 0 && ids[i - 1] == 0;
        last = i + 1;
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

  __device__ Interval of(int row) const {
    const int seqlen_q = problem.shape.seqlen_q, seqlen_k = problem.shape.seqlen_k;
    Interval keys{0, seqlen_k};
    const auto narrow = [&](int begin, int end) {
      keys.begin = max(keys.begin, begin);
      keys.end = min(keys.end, end);
    };
    if (problem.query_ids != nullptr) {
      const int id = problem.query_ids[std::int64_t(batch) * seqlen_q + row];
      if (id == 0) return {0, 0};
      if (problem.key_ids == nullptr) {
        narrow(runs[row].begin, runs[runs[row].begin].end);
      } else {
        const auto* const ids = problem.key_ids + std::int64_t(batch) * seqlen_k;
        const auto number = [&](int i) { return ids[i]; };
        narrow(first_greater(keys_end, id - 1, number), first_greater(keys_end, id, number));
      }
    }
    if (problem.query_ends != nullptr) {
      const int num_ends = problem.num_ends;
      const auto* const queries = problem.query_ends + std::int64_t(batch) * num_ends;
      const auto* const ends = problem.key_ends + std::int64_t(batch) * num_ends;
      const int document = first_greater(num_ends, row, [&](int i) { return queries[i]; }) - 1;
      if (document < 0 || document + 1 >= num_ends) return {0, 0};
      const int begin = clamp_to(ends[document], 0, seqlen_k);
      const int end = clamp_to(ends[document + 1], 0, seqlen_k);
      // Where the row stands among the keys if the ends of both meet.
      const int position = row + end - clamp_to(queries[document + 1], 0, seqlen_q);
      narrow(max(begin, position - problem.window.window_left),
             min(end, position + problem.window.window_right + 1));
    }
    const std::int64_t place = plane * seqlen_q + row;
    if (problem.kv_start != nullptr) narrow(problem.kv_start[place], seqlen_k);
    if (problem.kv_end != nullptr) narrow(0, problem.kv_end[place]);
    if (problem.chunk > 0) {
      const int offset =
          clamp_to(problem.query_offset ? problem.query_offset[batch] : problem.window.query_offset,
                   -kMaxSeqlen, kMaxSeqlen);
      const int position = row + offset;
      const int beyond = position % problem.chunk;
      const int begin = position - beyond - (beyond < 0 ? problem.chunk : 0);
      narrow(begin, begin + problem.chunk);
    }
    return keys;
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
  const auto interval_of = [&](int row) { return valid ? sources.of(row) : Interval{0, seqlen_k}; };
  bool falls = false;
  int rows_end = 0;
  Bounds bounds = Bounds::none();
  const Largest last = scan(
      seqlen_q,
      [&](int row) {
        const Interval keys = interval_of(row);
        return keys.begin < keys.end ? Largest{keys.begin, keys.end} : Largest{};
      },
      [&](int row, const Largest& own, const Largest& before) {
        const bool sees = own.second > 0;
        const Largest so_far = TakeLarger{}(own, before);
        plane.rows()[row] =
            sees ? Interval{own.first, own.second} : Interval{so_far.first, ~so_far.second};
        bounds.add(bounds_of(sees ? Interval{own.first, own.second} : Interval{0, 0}));
        if (!sees) return;
        falls |= own.first < before.first || own.second < before.second;
        rows_end = row + 1;
      },
      [&](int first) {
        add_neighbours<kThreadsOfBounds>(bounds);
        if (threadIdx.x % kThreadsOfBounds == 0 && first < seqlen_q) {
          plane.row_bounds()[first / kBoundsRows] = bounds;
        }
        bounds = Bounds::none();
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

  const bool monotone = plane.summary().flags & Plane::kMonotone;
  Interval seen_by[kKeysOfThread] = {{0, 0}, {0, 0}};
  Bounds bounds = Bounds::none();
  if (monotone) {
    const Interval* const rows = plane.rows();
#pragma unroll
    for (int k = 0; k < kKeysOfThread; ++k) {
      const int key = first_key + kKeysOfThread * lane + k;
      if (key >= seqlen_k) continue;
      const int begin = first_greater(seqlen_q, key, [&](int row) {
        const int end = rows[row].end;
        return end < 0 ? ~end : end;
      });
      const int end = first_greater(seqlen_q, key, [&](int row) { return rows[row].begin; });
      if (begin < end) seen_by[k] = {begin, end};
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
  const int first_of_thread = first_key + kKeysOfThread * lane;
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
