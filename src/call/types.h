// The words every layer shares: element types and the limits of the index arithmetic.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define JFA_HD __host__ __device__
#define JFA_ROLLED _Pragma("unroll 1")  // a loop of a thread that has few registers
#else
#define JFA_HD
#define JFA_ROLLED
#endif

namespace jax_fa3 {

enum class DType : std::int32_t { kBF16 = 0, kFP16 = 1 };

constexpr const char* to_string(DType dtype) { return dtype == DType::kBF16 ? "bf16" : "fp16"; }

// What a call has for which there are kernels of their own: dense arrays, or a score that is not
// the scaled product. A kernel has one of them; those for a bias take a mask beside it.
enum class Variant : std::int32_t {
  kPlain = 0,
  kMask = 1,
  kBias = 2,
  kSoftcap = 3,
  kAlibi = 4,
  kFunction = 5,  // of the user's, which is linked into the kernel
  kBlocks = 6     // that, and blocks that say who asks its mask
};

constexpr Variant kVariants[] = {Variant::kPlain,   Variant::kMask,  Variant::kBias,
                                 Variant::kSoftcap, Variant::kAlibi, Variant::kFunction,
                                 Variant::kBlocks};

constexpr const char* to_string(Variant variant) {
  constexpr const char* kNames[] = {"plain", "mask",     "bias",  "softcap",
                                    "alibi", "function", "blocks"};
  return kNames[static_cast<int>(variant)];
}

constexpr bool has_function(Variant variant) {
  return variant == Variant::kFunction || variant == Variant::kBlocks;
}

// Whether its kernels visit the tiles of a list rather than those of a range.
constexpr bool is_listed(Variant variant) {
  return variant == Variant::kMask || variant == Variant::kBias || variant == Variant::kBlocks;
}

// Row and column arithmetic is int32. With sequence lengths and offsets below kMaxSeqlen in
// magnitude, row + offset +/- kUnbounded neither overflows nor meets a real column.
constexpr std::int32_t kMaxSeqlen = 1 << 28;  // tokens
constexpr std::int32_t kUnbounded = 1 << 30;  // columns: a window side that is switched off

template <class T>
JFA_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace jax_fa3
