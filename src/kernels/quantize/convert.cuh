// Sixteen bits to float32 to e4m3, and the scale in between.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>

namespace jax_fa3 {

constexpr float kLargestFloat8 = 448.f;

// Pairs of 16-bit elements, as words of memory hold them.
template <class Pair>
__device__ float2 unpack(std::uint32_t word);
template <>
__device__ inline float2 unpack<__nv_bfloat162>(std::uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
__device__ inline float2 unpack<__half2>(std::uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}

template <class Pair>
__device__ std::uint32_t pack(float low, float high);
template <>
__device__ inline std::uint32_t pack<__nv_bfloat162>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}
template <>
__device__ inline std::uint32_t pack<__half2>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

// NaN for an infinity, which e4m3 does not have; anything else as it is.
__device__ inline float nan_if_infinite(float x) { return fmaf(x, 0.f, x); }

// The larger magnitude; NaN does not count.
__device__ inline float larger(float largest, float x) { return fmaxf(largest, fabsf(x)); }

// The scale that brings `largest` to the largest e4m3; never 0, since it divides.
__device__ inline float descale_of(float largest) {
  return fmaxf(__fdiv_rn(largest, kLargestFloat8), FLT_MIN);
}

// Two e4m3, the first in the low byte: rounded to nearest, ties to even, saturating; NaN stays.
__device__ inline std::uint32_t round_pair(float low, float high) {
  return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
}
__device__ inline std::uint32_t round_four(float a, float b, float c, float d) {
  return round_pair(a, b) | round_pair(c, d) << 16;
}

// The two numbers of a round_pair.
__device__ inline float2 widen_pair(std::uint32_t pair) {
  const auto half = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return __half22float2(__half2(half));
}

// The largest of the block's non-negative numbers, whose bits are ordered as they are.
template <int kThreads>
__device__ float largest_of_block(float mine) {
  static_assert(kThreads <= 1024 && kThreads % 32 == 0);
  __shared__ std::uint32_t of_warp[kThreads / 32];
  const std::uint32_t largest = __reduce_max_sync(~0u, __float_as_uint(mine));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(~0u, of_warp[threadIdx.x % (kThreads / 32)]));
}

}  // namespace jax_fa3
