// How the work of a call over caches is divided, from the lengths that the device reads: every
// group of CTAs (one for each kv head) takes an equal share of a line.
//
// An item, a sequence's block of packed rows, takes tiles + `beside` units of the line: some for
// what it costs beside its key tiles, then its tiles in order. Group g's share is [begin(g),
// begin(g + 1)). A boundary that leaves less than `least` tiles on a side of an item moves to the
// item's end there: two, so that a part gives both warpgroups of a CTA a tile, or more, where parts
// cost more than a share that is so much longer. Every group works that out by itself. Pure
// arithmetic for host and device; what bounds the extents keeps products in 64 bits
// (kernels/forward_cached/plan.cc).
#pragma once

#include <type_traits>

#include "attention/cached.h"

namespace jax_fa3 {

// a / b, of numbers that are not negative.
template <class T>
JFA_HD T quotient(T a, T b) {
  return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) /
                        static_cast<std::make_unsigned_t<T>>(b));
}

// How an item is divided: part i is worked on by group first_group + i.
struct Parts {
  int first_group;
  int count;
};

// What a share has of the tiles of an item, whose units begin at `base`.
template <class Units>
struct Portion {
  Units base;
  int of;  // tiles of the item
  Range tiles;
};

// `Units` counts units: int where a launch knows that a line, and a share more, are below 2^31, for
// the device's arithmetic of 64 bits is several instructions each; else 64 bits.
template <class Units>
struct Shares {
  static constexpr int kLeast = 2;     // tiles
  static constexpr int kOfShare = 24;  // `least` tiles are at most one in so many of a share's

  Units share;  // units of a group's
  int longer;   // groups, the first ones, that get one unit more
  int groups;   // that get a share
  int least;
  int beside;

  JFA_HD Shares(Units total, const Divisor& most_groups, int most_least = kLeast, int beside = 1)
      : beside(beside) {
    groups = total >= Units{kLeast + 1} * int{most_groups}
                 ? int{most_groups}
                 : max_of(1, static_cast<int>(total) / (kLeast + 1));
    if (sizeof(Units) == sizeof(int) && groups == most_groups) {
      share = static_cast<int>(total) / most_groups;
    } else {
      share = quotient(total, Units{groups});
    }
    longer = static_cast<int>(total - share * groups);
    least = share >= kOfShare * most_least ? most_least
                                           : max_of(kLeast, static_cast<int>(share) / kOfShare);
  }

  JFA_HD Units begin(int group) const { return share * group + min_of(group, longer); }

  // The tiles of an item from `base` that a share [from, to) has. One without tiles belongs to the
  // share that its unit is in.
  JFA_HD Range tiles(Units base, int tiles, Units from, Units to) const {
    return {boundary(base, tiles, from), boundary(base, tiles, to)};
  }
  JFA_HD static bool owns(const Range& part, Units base, int tiles, Units from, Units to) {
    return tiles > 0 ? !part.empty() : base >= from && base < to;
  }

  // Whether each of so few items is best left whole, a group's own: by the line, a group would have
  // two short ones beside another's long one. `longest` has the units of the longest.
  JFA_HD bool are_one_each(int items, int longest) const {
    return items <= groups && 2 * Units{longest} <= 3 * share;
  }

  // Of the item of a portion. boundary() is inside of it where
  // base + beside + least <= begin(g) < base + beside + tiles + 1 - least.
  JFA_HD Parts parts(const Portion<Units>& x) const {
    if (x.tiles.size() == x.of) return {0, 1};
    const Units tiles = x.base + beside;
    const int first = first_from(tiles + least);
    return {first - 1, first_from(tiles + x.of + 1 - least) - first + 1};
  }

 private:
  // The first group whose share begins at `unit` or behind it, up to the end of the line, where
  // that is `groups`. A search: a division of 64 bits takes registers that the device's scheduling
  // warp does not have, and nobody waits for this one.
  JFA_HD int first_from(Units unit) const {
    int first = 0;
    JFA_ROLLED
    for (int end = groups; first < end;) {
      const int middle = (first + end) / 2;
      if (begin(middle) < unit) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first;
  }
  // Which tile of an item comes first behind a boundary.
  JFA_HD int boundary(Units base, int tiles, Units unit) const {
    if (tiles < 2 * least) return unit > base + (beside - 1 + tiles) / 2 ? tiles : 0;
    if (unit >= base + beside + tiles + 1 - least) return tiles;
    return unit < base + beside + least ? 0 : static_cast<int>(unit - base) - beside;
  }
};

}  // namespace jax_fa3
