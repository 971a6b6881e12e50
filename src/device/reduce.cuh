// Reductions in global memory.
#pragma once

#include <cute/config.hpp>

namespace jax_fa3 {

// Adds four floats to 16 aligned bytes of global memory, each atomically.
CUTE_DEVICE void reduce_add(float* address, float x, float y, float z, float w) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x),
               "f"(y), "f"(z), "f"(w)
               : "memory");
}

// As atomicAdd, but without the code that merges the requests of a warp's threads.
CUTE_DEVICE int fetch_add(int* address, int value) {
  int previous;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(previous)
               : "l"(address), "r"(value)
               : "memory");
  return previous;
}

// The same, ordered: what this thread has seen written before is seen by those that come later.
CUTE_DEVICE int fetch_add_acq_rel(int* address, int value) {
  int previous;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(previous)
               : "l"(address), "r"(value)
               : "memory");
  return previous;
}

}  // namespace jax_fa3
