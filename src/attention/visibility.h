// Row intervals: of each query row the keys [begin, end) that it may see, in a table of device
// memory that is made once (kernels/visibility) and read by the attention kernels of any number of
// calls. A call's lengths and windows are not in it; they narrow what it says.
//
// The table has a plane for each (batch, head), or for all of either. A plane has, each part in
// whole groups of four words:
//
//   Plane                                  what is true of all of it
//   Interval [seqlen_q]                    of each row, of keys
//   Bounds [seqlen_q / 64, rounded up]     of 64 rows' intervals
//   Bounds [seqlen_k / 64, rounded up]     of 64 keys' intervals
//   Interval [seqlen_k]                    of each key, of the rows that see it; only where the
//                                          plane is monotone
//
// Pure arithmetic for host and device. No number in a table is trusted: whoever makes an address
// or a loop of one clamps it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "call/problem.h"

namespace jax_fa3 {

constexpr int kBoundsRows = 64;             // a warpgroup's
constexpr std::int32_t kNone = kMaxSeqlen;  // begins behind everything

// [begin, end). A row that sees nothing has an end below 0, and its complement is an end that falls
// as little as those of its neighbours do.
struct alignas(8) Interval {
  std::int32_t begin = 0;
  std::int32_t end = kNone;
};

// Of 64 intervals: what they cover together is in [least_begin, greatest_end), and what is in
// [greatest_begin, least_end) all of them have. An empty one adds nothing to the first and leaves
// nothing of the second.
struct alignas(16) Bounds {
  std::int32_t least_begin = 0;
  std::int32_t greatest_begin = 0;
  std::int32_t least_end = kNone;
  std::int32_t greatest_end = kNone;

  // Of more intervals than these.
  JFA_HD void add(const Bounds& more) {
    least_begin = more.least_begin < least_begin ? more.least_begin : least_begin;
    greatest_begin = more.greatest_begin > greatest_begin ? more.greatest_begin : greatest_begin;
    least_end = more.least_end < least_end ? more.least_end : least_end;
    greatest_end = more.greatest_end > greatest_end ? more.greatest_end : greatest_end;
  }
  // Of no intervals.
  JFA_HD static Bounds none() { return {kNone, 0, kNone, 0}; }
};

struct alignas(16) Plane {
  static constexpr std::int32_t kValid = 1;     // else results are NaN
  static constexpr std::int32_t kMonotone = 2;  // begins and ends never fall from row to row

  std::int32_t flags;
  std::int32_t rows_end;  // no row from here on sees anything
  std::int32_t keys_end;  // no key from here on is seen
  std::int32_t unused;

  // Of one more plane.
  JFA_HD void add(const Plane& more) {
    flags &= more.flags;
    rows_end = more.rows_end > rows_end ? more.rows_end : rows_end;
    keys_end = more.keys_end > keys_end ? more.keys_end : keys_end;
  }
};

// Where the parts of a plane are, in words: up to kMaxSeqlen rows and keys these fit 32 bits.
struct PlaneLayout {
  int seqlen_q;
  int seqlen_k;

  static constexpr int kRows = sizeof(Plane) / sizeof(std::int32_t);
  JFA_HD int row_bounds() const { return kRows + whole(2 * seqlen_q); }
  JFA_HD int key_bounds() const { return row_bounds() + 4 * ceil_div(seqlen_q, kBoundsRows); }
  JFA_HD int keys() const { return key_bounds() + 4 * ceil_div(seqlen_k, kBoundsRows); }
  JFA_HD int words() const { return keys() + whole(2 * seqlen_k); }

 private:
  JFA_HD static int whole(int words) { return (words + 3) / 4 * 4; }
};

// A plane of a table, by its parts; of no table if `words` is null.
template <class Word>
struct PlaneView {
  Word* words;
  PlaneLayout layout;

  JFA_HD auto& summary() const { return *at<Plane>(0); }
  JFA_HD auto* rows() const { return at<Interval>(PlaneLayout::kRows); }
  JFA_HD auto* row_bounds() const { return at<Bounds>(layout.row_bounds()); }
  JFA_HD auto* key_bounds() const { return at<Bounds>(layout.key_bounds()); }
  JFA_HD auto* keys() const { return at<Interval>(layout.keys()); }

 private:
  template <class T>
  JFA_HD auto* at(int word) const {
    if constexpr (std::is_const_v<Word>) {
      return reinterpret_cast<const T*>(words + word);
    } else {
      return reinterpret_cast<T*>(words + word);
    }
  }
};

}  // namespace jax_fa3
