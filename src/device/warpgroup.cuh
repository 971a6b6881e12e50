// The warpgroups of a CTA: one gives its registers away and produces, the others consume.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include "device/mma.cuh"

namespace jax_fa3 {

// Registers of a thread. Together they are what a launch of 128 threads more than the consumers'
// gives: 168 to each of 384 threads, 128 to each of 512.
struct Registers {
  int producer;
  int consumer;
};

// `wide`: consumers that need all that the producer can spare.
constexpr Registers registers_of(int consumers, bool wide) {
  if (consumers == 3) return {32, 160};
  return wide ? Registers{24, 240} : Registers{40, 232};
}

// A thread's number in its warpgroup, and the one thread that acts for all.
CUTE_DEVICE int warpgroup_thread() { return threadIdx.x % kWarpgroupThreads; }
CUTE_DEVICE bool leads_warpgroup() { return threadIdx.x % kWarpgroupThreads == 0; }

// Zeroes rows [first_row, kRows) of a tile, for the WGMMAs of a warpgroup whose threads all call it
// and that meets before it issues them.
template <class Tile>
CUTE_DEVICE void zero_rows_from(typename Tile::Element* tile, int first_row) {
  Tile::zero_rows_from(tile, first_row, warpgroup_thread(), kWarpgroupThreads);
}

}  // namespace jax_fa3
