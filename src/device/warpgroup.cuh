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
  Tile::zero_rows(tile, first_row, Tile::kRows, warpgroup_thread(), kWarpgroupThreads);
}

// A named barrier of one warpgroup that also tells all of its threads whether `condition` holds in
// any.
CUTE_DEVICE bool any_of_warpgroup(bool condition, std::uint32_t barrier) {
  std::uint32_t any;
  asm volatile(
      "{\n"
      "  .reg .pred mine, all;\n"
      "  setp.ne.u32 mine, %1, 0;\n"
      "  bar.red.or.pred all, %2, %3, mine;\n"
      "  selp.u32 %0, 1, 0, all;\n"
      "}\n"
      : "=r"(any)
      : "r"(std::uint32_t(condition)),
        "r"(barrier + cutlass::arch::NamedBarrier::ReservedNamedBarrierCount),
        "n"(kWarpgroupThreads)
      : "memory");
  return any != 0;
}

}  // namespace jax_fa3
