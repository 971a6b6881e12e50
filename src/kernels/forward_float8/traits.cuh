// What a float8 forward Config makes of the forward kernel: operands of one byte, V transposed.
#pragma once

#include "attention/prepared_value.h"
#include "kernels/forward/traits.cuh"
#include "kernels/forward_float8/config.h"
#include "kernels/forward_float8/softmax.cuh"

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
  static_assert(kDescaleBlock % kBlockN == 0, "a key tile has one scale");
  static_assert(kDescaleBlock % kWarpgroupRows == 0, "a warpgroup's rows have one scale");
  static_assert(kPreparedBlock % kBlockN == 0, "tiles end where prepared value ends");

  using QTile = SmemTile<Element, kBlockM, kHeadDim>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim>;
  using VTile = SmemTile<Element, kHeadDimV, kBlockN>;        // V^T, prepared
  using OTile = SmemTile<std::uint16_t, kBlockM, kHeadDimV>;  // bits of bf16 or fp16

  static constexpr int kKeyBytes = KTile::kBytes;  // of a stage

  // A stage of value is V^T and, behind it, rows of ones: as many as a product has at least.
  static constexpr int kSumRows = 8;
  static constexpr int kValueElements = VTile::kElements + kSumRows * kBlockN;
  static constexpr int kOutputColumns = kHeadDimV + kSumRows;
  static_assert(VTile::kChunks == 1, "the rows of ones are rows of the same tile");

  // Whether registers hold O, the sums of a group of tiles, P and the next S. At 64 they do not:
  // three warpgroups share them.
  static constexpr bool kOverlap = kHeadDimV > 64 && kHeadDimV <= 128;
  static constexpr bool kPingPong = kOverlap;
  static constexpr bool kWide = kHeadDimV > 192;
  // Key tiles that the tensor cores sum, where products overlap; elsewhere it is one. Of four,
  // every second value of 1 would come out wrong by up to 0.6 %; of two, the speed is 1 % less.
  static constexpr int kTilesOfSum = 3;
  // Elsewhere O's columns are summed in parts, those of the weights' sums with the last.
  static constexpr int kParts = kHeadDimV > 128 ? 2 : 1;
  static constexpr int kPartColumns = kHeadDimV / kParts;
  template <int kPart>
  static constexpr int kColumnsOfPart = kPartColumns + (kPart == kParts - 1 ? kSumRows : 0);
  using SummedTile = SmemTile<Element, kOutputColumns, kBlockN>;
  using MmaO = MmaRS<Element, kOverlap ? kOutputColumns : kPartColumns, Major::K>;

  // As measured: without maxima head_dim 64 gains 8 %, and 128 loses 15.
  static constexpr bool kFindsMaxima = kHeadDimV > 64;
  // Scores of a tile (of 64 a thread) that are exponentiated when a turn ends: where exponentials
  // take longer than the products, the warpgroups' should not coincide.
  static constexpr int kScoresOfTurn = kHeadDim == 128 && kHeadDimV == 128 ? 16 : 0;

  // S = Q K^T. 8-bit WGMMA takes K-major operands only.
  using MmaS = MmaSS<Element, kBlockN, Major::K, Major::K>;
  using Softmax = Float8Softmax;
  static constexpr float kThreshold = 2.f;

  using Source = ContiguousPrepared<KTile, VTile>;
  using Score = Plain;
  using Masking = RowIntervals;
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
