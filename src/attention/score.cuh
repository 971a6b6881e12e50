// From a product q . k to a logit, in a warpgroup's registers. A kernel's Score is one of these
// policies; the softmax multiplies what it leaves by the logit_scale, in the instruction that
// subtracts the maximum.
#pragma once

#include <cmath>
#include <cute/config.hpp>

#include "attention/score.h"
#include "call/types.h"
#include "device/mma.cuh"

// What the text of a call's functions defines (docs/design/flex.md), and nvJitLink links.
extern "C" __device__ float jfa_score(float score, int batch, int head, int row, int key,
                                      const JfaCaptured& captured);
extern "C" __device__ bool jfa_is_additive();
extern "C" __device__ float jfa_addend(float unit, int batch, int head, int row, int key,
                                       const JfaCaptured& captured);
extern "C" __device__ bool jfa_has_key_slope();
extern "C" __device__ float jfa_key_slope(float unit, int batch, int head,
                                          const JfaCaptured& captured);
extern "C" __device__ JfaScore jfa_score_and_slope(float score, int batch, int head, int row,
                                                   int key, const JfaCaptured& captured);
extern "C" __device__ bool jfa_mask(int batch, int head, int row, int key,
                                    const JfaCaptured& captured);

namespace jax_fa3 {

CUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A relative error of 2^-11, less than that of P in 16 bits for caps up to 50.
CUTE_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Where a tile's first pair of a query row and a key stands.
struct Corner {
  int row;
  int position;  // the row's among the keys
  int key;
  bool looks_back = false;  // whether no row sees a key behind its position; for ShiftedAlibi
};

// Whether the rows of a tile are query rows, as those of S, or keys, as those of S^T.
enum class Rows { kQueries, kKeys };

// P of a score, and what dS is for a dP of 1.
struct Weight {
  float p;
  float slope;
};

// What a tile's scores lack, the same for all that a thread has of a row: nothing, or `of` each of
// its two rows, which is not above 0 where the row sees any of them. add_to_found() is for maxima of
// which a negative one is known to be negative, and no more.
struct NoShift {
  CUTE_DEVICE void add_to(float (&)[2]) const {}
  CUTE_DEVICE void add_to_found(float (&)[2]) const {}
  template <class Accumulator>
  CUTE_DEVICE void add_to_scores(Accumulator&) const {}
  CUTE_DEVICE float below(int /*row*/, float reference, float /*scale_log2*/) const {
    return reference;
  }
};
struct RowShift {
  float of[2];

  CUTE_DEVICE void add_to(float (&rows)[2]) const {
    rows[0] += of[0];
    rows[1] += of[1];
  }
  CUTE_DEVICE void add_to_found(float (&rows)[2]) const { add_to(rows); }
  template <class Accumulator>
  CUTE_DEVICE void add_to_scores(Accumulator& tS) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) tS(i) += of[accumulator_row(i)];
  }
  // A row's reference, in log2 units, for scores that lack the shift.
  CUTE_DEVICE float below(int row, float reference, float scale_log2) const {
    return fmaf(-of[row], scale_log2, reference);
  }
};
// That of a function, where it has a slope along the keys: that is known when it is linked. It may
// be above 0. A maximum that is found may then be too high, which makes the softmax look closer.
struct FunctionShift : RowShift {
  CUTE_DEVICE void add_to(float (&rows)[2]) const {
    if (jfa_has_key_slope()) RowShift::add_to(rows);
  }
  CUTE_DEVICE void add_to_found(float (&rows)[2]) const {
    if (!jfa_has_key_slope()) return;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) rows[r] = fmaxf(rows[r], 0.f) + of[r];
  }
  template <class Accumulator>
  CUTE_DEVICE void add_to_scores(Accumulator& tS) const {
    if (jfa_has_key_slope()) RowShift::add_to_scores(tS);
  }
  CUTE_DEVICE float below(int row, float reference, float scale_log2) const {
    return jfa_has_key_slope() ? RowShift::below(row, reference, scale_log2) : reference;
  }
};

// A policy is made for a query head. apply() turns products into scores, before a mask makes some
// of them -inf, and may leave a shift. weigh(), which linear ones do without, is for the backward
// pass.

// The logit is scale * (q . k).
struct Plain {
  // Whether what a score leaves grows as the product does. Then the backward pass may subtract a
  // row's LSE within the product itself (backward/statistics.cuh), and dS is made of P and dP
  // alone.
  static constexpr bool kIsLinear = true;

  CUTE_DEVICE Plain(const ScoreParams&, int /*batch*/, int /*head*/) {}
  template <Rows, class Accumulator>
  CUTE_DEVICE NoShift apply(Accumulator&, const Corner&) const {
    return {};
  }
};

// The logit is softcap * tanh(scale * (q . k) / softcap).
struct Softcap {
  static constexpr bool kIsLinear = false;

  CUTE_DEVICE Softcap(const ScoreParams& params, int /*batch*/, int /*head*/)
      : factor_(params.factor) {}

  template <Rows, class Accumulator>
  CUTE_DEVICE NoShift apply(Accumulator& tS, const Corner&) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) tS(i) = tanh_approx(tS(i) * factor_);
    return {};
  }

  // A score that a mask has made -inf counts as -1, where the slope is 0.
  CUTE_DEVICE Weight weigh(float score, float scale_log2, float negative_lse_log2, int /*row*/,
                           int /*key*/) const {
    const float p = exp2_approx(fmaf(score, scale_log2, negative_lse_log2));
    const float t = fmaxf(score, -1.f);
    return {p, p * fmaf(-t, t, 1.f)};
  }

 private:
  float factor_;
};

// The logit is scale * (q . k) - slope * |position of the row - key|. This is the backward pass'.
struct Alibi {
  static constexpr bool kIsLinear = true;

  CUTE_DEVICE Alibi(const ScoreParams& params, int batch, int head)
      : slope_(params.slopes.of(batch, head) * params.factor) {}

  template <Rows kRows, class Accumulator>
  CUTE_DEVICE void apply(Accumulator& tS, const Corner& corner) const {
    const int distance =
        kRows == Rows::kQueries ? corner.position - corner.key : corner.key - corner.position;
    float first[2];  // of the thread's two rows, in its first column
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      first[r] = slope_ * float(distance + thread_row() + 8 * r - thread_col());
    }
    // Two loops, or the sign would be an instruction more for each score. A vote: only a branch
    // known to be uniform leaves GEMMs in flight alone.
    if (__any_sync(0xffffffff, slope_ > 0.f)) {
      add<1>(tS, first);
    } else {
      add<-1>(tS, first);
    }
  }

 private:
  template <int kSign, class Accumulator>
  CUTE_DEVICE void add(Accumulator& tS, const float (&first)[2]) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const float x = fmaf(slope_, -float(accumulator_col(i)), first[accumulator_row(i)]);
      tS(i) += kSign * fabsf(x);
    }
  }

  float slope_;  // of products
};

// A slope of logits, from key to key, that a tile's scores may lack but for the columns' part. A
// steeper one would cost a score more of its last digits across a tile than it does between a row
// and the keys that have any weight.
constexpr float kSlight = 1.f;

// The forward pass'. In a tile all of whose keys are on one side of the rows, a score falls or
// grows by the slope from column to column: that is one instruction, of which the column is a
// constant. The rest is the thread's shift.
struct ShiftedAlibi {
  static constexpr bool kIsLinear = true;

  CUTE_DEVICE ShiftedAlibi(const ScoreParams& params, int batch, int head) {
    const float slope = params.slopes.of(batch, head);
    slope_ = slope * params.factor;
    is_slight_ = __all_sync(0xffffffff, slope >= 0.f && slope <= kSlight);
  }

  template <Rows kRows, class Accumulator>
  CUTE_DEVICE RowShift apply(Accumulator& tS, const Corner& corner) const {
    static_assert(kRows == Rows::kQueries);
    constexpr int kCols = 2 * decltype(cute::size(tS))::value;  // four threads have a row's
    // Where nobody sees what is right of a row, that may have any score.
    const bool is_left = corner.looks_back || corner.position >= corner.key + kCols - 1;
    const bool is_right = corner.key >= corner.position + kWarpgroupRows - 1;
    const float distance =
        float(corner.position - corner.key + thread_row() - thread_col());  // of the first row
    // A vote: only a branch known to be uniform leaves GEMMs in flight alone.
    if (__any_sync(0xffffffff, !is_slight_ || !(is_left || is_right))) {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(tS); ++i) {
        const float to_column = distance + float(8 * accumulator_row(i) - accumulator_col(i));
        tS(i) = fmaf(slope_, fabsf(to_column), tS(i));
      }
      return {{0.f, 0.f}};
    }
    const float growth = is_left ? -slope_ : slope_;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      if (accumulator_col(i) == 0) continue;
      tS(i) = fmaf(growth, float(accumulator_col(i)), tS(i));
    }
    return {{-growth * distance, -growth * (distance + 8.f)}};
  }

 private:
  float slope_;  // of products
  bool is_slight_;
};

// The logit is a function of scale * (q . k) and of where the pair stands, where another one lets
// it be seen. Both are linked into the kernel. This is the forward pass'.
struct Function {
  static constexpr bool kIsLinear = false;

  CUTE_DEVICE Function(const FunctionParams& params, int batch, int head)
      : params_(params),
        batch_(__ldg(params.batch_numbers + batch)),
        head_(__ldg(params.head_numbers + head)),
        key_slope_(jfa_key_slope(params.unit, batch_, head_, params.captured)) {}

  // From what apply() leaves to a logit, of base 2. An additive function leaves the product as it
  // is and adds to it in the product's units: the scale is then the softmax's, for no instruction.
  // Whether it is additive is known when it is linked.
  CUTE_DEVICE static float logit_scale_log2(const FunctionParams& params) {
    return jfa_is_additive() ? params.scale * kLog2e : kLog2e;
  }

  // `asks`: whether who sees whom is a question here.
  template <Rows kRows, class Accumulator>
  CUTE_DEVICE FunctionShift apply(Accumulator& tS, const Corner& corner, bool asks = true) const {
    static_assert(kRows == Rows::kQueries);
    FunctionShift shift{{{0.f, 0.f}}};
    // A vote: only a branch known to be uniform leaves GEMMs in flight alone.
    if (jfa_has_key_slope() &&
        __all_sync(0xffffffff, fabsf(key_slope_ * params_.scale) <= kSlight)) {
      shift = add_columns(tS, corner);
    } else if (jfa_is_additive()) {
      add<kRows>(tS, corner);
    } else {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(tS); ++i) {
        const Pair pair = pair_of<kRows>(corner, i);
        tS(i) =
            jfa_score(tS(i) * params_.scale, batch_, head_, pair.row, pair.key, params_.captured);
      }
    }
    hide<kRows>(tS, corner, asks);
    return shift;
  }

 protected:
  struct Pair {
    int row, key;
  };

  // Of accumulator element i.
  template <Rows kRows>
  CUTE_DEVICE static Pair pair_of(const Corner& corner, int i) {
    const int along_rows = thread_row() + 8 * accumulator_row(i);
    const int along_cols = thread_col() + accumulator_col(i);
    if (kRows == Rows::kQueries) return {corner.row + along_rows, corner.key + along_cols};
    return {corner.row + along_cols, corner.key + along_rows};
  }

  // Of an additive function.
  CUTE_DEVICE float addend(const Pair& pair) const {
    return jfa_addend(params_.unit, batch_, head_, pair.row, pair.key, params_.captured);
  }

  template <Rows kRows, class Accumulator>
  CUTE_DEVICE void add(Accumulator& tS, const Corner& corner) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) tS(i) += addend(pair_of<kRows>(corner, i));
  }

  // One instruction for a score, of which the column is a constant; the rest is the thread's shift.
  template <class Accumulator>
  CUTE_DEVICE FunctionShift add_columns(Accumulator& tS, const Corner& corner) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      if (accumulator_col(i) == 0) continue;
      tS(i) = fmaf(key_slope_, float(accumulator_col(i)), tS(i));
    }
    const Pair first = pair_of<Rows::kQueries>(corner, 0);
    return {{{addend(first), addend({first.row + 8, first.key})}}};
  }

  // Makes what the mask hides -inf. One branch for all pairs: with one for each, the loads of the
  // mask would be waited for one by one. A vote, because only a branch known to be uniform leaves
  // GEMMs in flight alone.
  template <Rows kRows, class Accumulator>
  CUTE_DEVICE void hide(Accumulator& tS, const Corner& corner, bool asks) const {
    if (!__any_sync(0xffffffff, asks)) return;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const Pair pair = pair_of<kRows>(corner, i);
      if (!jfa_mask(batch_, head_, pair.row, pair.key, params_.captured)) tS(i) = -INFINITY;
    }
  }

  const FunctionParams& params_;
  int batch_, head_;
  float key_slope_;  // of products, where there is one
};

// The backward pass'. An additive function is added to the product, and its derivative is 1. Of
// another one value and derivative come at once, of a product.
struct FunctionGradient : Function {
  using Function::Function;

  template <Rows kRows, class Accumulator>
  CUTE_DEVICE void apply(Accumulator& tS, const Corner& corner, bool asks = true) const {
    if (jfa_is_additive()) add<kRows>(tS, corner);
    hide<kRows>(tS, corner, asks);
  }

  // What is hidden is -inf, and counts as nothing whatever a function says of it: that may be NaN.
  CUTE_DEVICE Weight weigh(float score, float scale_log2, float negative_lse_log2, int row,
                           int key) const {
    if (jfa_is_additive()) {
      const float p = exp2_approx(fmaf(score, logit_scale_log2(params_), negative_lse_log2));
      return {p, p};
    }
    const JfaScore logit =
        jfa_score_and_slope(score * params_.scale, batch_, head_, row, key, params_.captured);
    if (score == -INFINITY || logit.score == -INFINITY) return {0.f, 0.f};
    const float p = exp2_approx(fmaf(logit.score, scale_log2, negative_lse_log2));
    return {p, p * logit.slope};
  }
};

template <Variant>
struct ScoreChoice {
  using Forward = Plain;
  using Backward = Plain;
};
template <>
struct ScoreChoice<Variant::kSoftcap> {
  using Forward = Softcap;
  using Backward = Softcap;
};
template <>
struct ScoreChoice<Variant::kAlibi> {
  using Forward = ShiftedAlibi;
  using Backward = Alibi;
};
template <>
struct ScoreChoice<Variant::kFunction> {
  using Forward = Function;
  using Backward = FunctionGradient;
};
template <>
struct ScoreChoice<Variant::kBlocks> : ScoreChoice<Variant::kFunction> {};
template <Variant kVariant>
using ScoreOf = typename ScoreChoice<kVariant>::Forward;
template <Variant kVariant>
using BackwardScoreOf = typename ScoreChoice<kVariant>::Backward;

}  // namespace jax_fa3
