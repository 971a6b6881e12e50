// What a float8 forward Config makes of the forward kernel: operands of one byte, V transposed.
#pragma once

#include "attention/prepared_value.h"
#include "kernels/forward/traits.cuh"
#include "kernels/forward_float8/config.h"

namespace jax_fa3 {

// rescale_threshold has no meaning: what e4m3 leaves room for is ForwardFloat8Operands::kThreshold.
struct ForwardFloat8Params : ForwardParams {
  const float* query_descale;  // [b, h_q, query_descales]
  const float* key_descale;    // [b, h_kv, key_descales]
  const float* value_descale;  // [b, h_kv]
  int query_descales;          // of a head: 1, or one for each kDescaleBlock rows
  int key_descales;
  bool out_is_fp16;  // else bf16
};

template <class Config>
struct ForwardFloat8Operands {
  using Params = ForwardFloat8Params;
  using Element = cutlass::float_e4m3_t;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kBlockN = Config::kBlockN;
  static constexpr int kPromote = Config::kPromote;
  static_assert(kDescaleBlock % kBlockN == 0, "a key tile has one scale");
  static_assert(kDescaleBlock % kWarpgroupRows == 0, "a warpgroup's rows have one scale");
  static_assert(kPreparedBlock % kBlockN == 0, "tiles end where prepared value ends");
  static_assert(kPromote >= 0 && (kPromote & (kPromote - 1)) == 0);

  using QTile = SmemTile<Element, kBlockM, kHeadDim>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim>;
  using VTile = SmemTile<Element, kHeadDimV, kBlockN>;        // V^T, prepared
  using OTile = SmemTile<std::uint16_t, kBlockM, kHeadDimV>;  // bits of bf16 or fp16

  // S = Q K^T, O += P V with P from registers. 8-bit WGMMA takes K-major operands only.
  using MmaS = MmaSS<Element, kBlockN, Major::K, Major::K>;
  using MmaO = MmaRS<Element, kHeadDimV, Major::K>;
  // P uses the range of e4m3: at most 2^(6 + 2), of 448. Whole numbers: where the reference is the
  // maximum, the largest P is a power of two and has no rounding error. Sums are of P before it is
  // rounded.
  // As measured: finding a row's maximum anew is faster at head dim 128 on short sequences only.
  static constexpr bool kReuseFound = !(kHeadDim == 128 && kHeadDimV == 128 && kPromote == 0);
  using Softmax = OnlineSoftmax<6, kReuseFound>;
  static constexpr float kThreshold = 2.f;

  // A turn ends when so many of a tile's scores are exponentiated (of 64 a thread): where these
  // take longer than the products, the warpgroups' exponentials should not coincide.
  static constexpr int kScoresOfTurn = kHeadDim == 128 && kHeadDimV == 128 ? 16 : 0;

  using Source = ContiguousPrepared<KTile, VTile>;
  using Score = Plain;
  using Masking = Window;
};

template <class Config>
using ForwardFloat8Traits = ForwardLayout<ForwardFloat8Operands<Config>>;

// Prepared value's order of keys is the one in which convert_float8 hands over scores: for each
// thread and element of a k-step's operand A, its position in the contraction, as a key, is the
// column of the accumulator's element that it is made of, and the rows are the same.
constexpr bool scores_meet_prepared_value() {
  constexpr int kRows = kWarpgroupRows, kStep = 32;
  const cute::GMMA::ALayout_64x32 operand;
  const cute::GMMA::CLayout_64x32 scores;
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    for (int v = 0; v < 16; ++v) {
      const int a = operand(thread, v), c = scores(thread, float8_source(v));
      const int position = a / kRows;
      const int key =
          position / kPreparedGroup * kPreparedGroup + prepared_key(position % kPreparedGroup);
      if (position >= kStep || a % kRows != c % kRows || key != c / kRows) return false;
    }
  }
  return true;
}
static_assert(scores_meet_prepared_value());

}  // namespace jax_fa3
