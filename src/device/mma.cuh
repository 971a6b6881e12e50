// WGMMA of one warpgroup: 64 rows of output by kN columns, float32 accumulation.
//
// A thread's accumulator is a plain array. Element i stands at
//   row  = 16 * warp + lane / 4 + 8 * accumulator_row(i)
//   col  = 2 * (lane % 4) + accumulator_col(i)
// and elements 8k .. 8k+7, converted to 16 bits in order, are the A operand of k-step k of a
// following GEMM that contracts along these columns.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>

#include "device/tile.cuh"

namespace jax_fa3 {

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64;

CUTE_HOST_DEVICE constexpr int accumulator_row(int i) { return (i >> 1) & 1; }
CUTE_HOST_DEVICE constexpr int accumulator_col(int i) { return (i >> 2) * 8 + (i & 1); }

// The first row and the first column of this thread's accumulator.
CUTE_DEVICE int thread_row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
CUTE_DEVICE int thread_col() { return threadIdx.x % 4 * 2; }

using cute::GMMA::Major;

// The length of one instruction's contraction: 32 bytes.
template <class Element>
using StepK = cute::Int<32 / int(sizeof(Element))>;

// Both operands from shared memory.
template <class Element, int kN, Major kMajorA, Major kMajorB>
using MmaSS = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<Element, Element, float,
                               cute::Shape<cute::_64, cute::Int<kN>, StepK<Element>>, kMajorA,
                               kMajorB>()));
// A from registers, B from shared memory.
template <class Element, int kN, Major kMajorB>
using MmaRS = decltype(cute::make_tiled_mma(
    cute::GMMA::rs_op_selector<Element, Element, float,
                               cute::Shape<cute::_64, cute::Int<kN>, StepK<Element>>, Major::K,
                               kMajorB>()));

// Of 64 rows, or of a multiple of them, 64 after 64.
template <class Mma, int kN, int kM = kWarpgroupRows>
CUTE_DEVICE auto make_accumulator() {
  static_assert(cute::tile_size<1>(Mma{}) == kN, "no WGMMA instruction of this width");
  return cute::partition_fragment_C(Mma{}, cute::Shape<cute::Int<kM>, cute::Int<kN>>{});
}

// An A operand in registers for a contraction over kK.
template <class Element, int kK>
CUTE_DEVICE auto make_operand_a() {
  using Word = cute::Int<4 / int(sizeof(Element))>;  // elements of a register
  using Steps = cute::Int<kK / StepK<Element>::value>;
  return cute::make_tensor<Element>(
      cute::Layout<cute::Shape<cute::Shape<Word, cute::_2, cute::_2>, cute::_1, Steps>>{});
}

// Rounds an accumulator (or a part of it) to 16 bits, element by element.
template <class Accumulator, class Operand>
CUTE_DEVICE void convert(const Accumulator& source, Operand& target) {
  using Element = typename Operand::value_type;
  constexpr int kCount = decltype(cute::size(source))::value;
  static_assert(kCount == decltype(cute::size(target))::value);
  cutlass::NumericArrayConverter<Element, float, kCount> converter;
  auto& from = *reinterpret_cast<const cutlass::Array<float, kCount>*>(source.data());
  *reinterpret_cast<cutlass::Array<Element, kCount>*>(target.data()) = converter(from);
}

// Element v of an 8-bit operand A that convert_float8 makes is element float8_source(v) of the
// accumulator. Of 16 columns a thread has four in a row, a pair here and a pair 8 further on; they
// become four neighbouring positions of the contraction, so that the operand's columns are those
// of the accumulator in another order within every 16: position 4c + i stands for column
// 8 (i / 2) + 2c + i % 2. B must have its rows in the same order.
CUTE_HOST_DEVICE constexpr int float8_source(int v) {
  const int pair = v % 4 / 2, row = v / 4 % 2;
  return v / 8 * 8 + 4 * pair + 2 * row + v % 2;
}

// Rounds an accumulator to e4m3 (saturating), as an operand A.
template <class Accumulator, class Operand>
CUTE_DEVICE void convert_float8(const Accumulator& source, Operand& target) {
  using Element = cutlass::float_e4m3_t;
  static_assert(cute::is_same_v<typename Operand::value_type, Element>);
  constexpr int kCount = decltype(cute::size(source))::value;
  static_assert(kCount == decltype(cute::size(target))::value);
  cutlass::NumericArrayConverter<Element, float, 4> converter;
  CUTE_UNROLL
  for (int v = 0; v < kCount; v += 4) {
    cutlass::Array<float, 4> word;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) word[i] = source(float8_source(v + i));
    *reinterpret_cast<cutlass::Array<Element, 4>*>(&target(v)) = converter(word);
  }
}

// Four 8 x 8 matrices of 16 bits from a warp's registers to shared memory: lane 8i + j has the
// address of row j of matrix i.
CUTE_DEVICE void store_matrices(std::uint32_t address, const std::uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// The same from shared memory to registers; transposed, a thread gets what it would of each matrix'
// transpose.
CUTE_DEVICE void load_matrices(std::uint32_t address, std::uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
CUTE_DEVICE void load_matrices_transposed(std::uint32_t address, std::uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

enum class Accumulate { kOverwrite, kAdd };

// Issues C (+)= A * B for operands already partitioned (descriptors or registers) and commits
// the group; returns before it is done. C and a register A must not be touched until
// wait_mma has returned for this group. kAdd with `keep` false, a choice made at run time, drops
// what C held.
template <Accumulate kMode, class Mma, class A, class B, class C>
CUTE_DEVICE void issue_mma(Mma mma, const A& tA, const B& tB, C& tC, bool keep = true) {
  constexpr bool kRegisterA =
      !cute::is_base_of_v<cute::GMMA::DescriptorIterator, typename Mma::FrgTypeA>;
  if constexpr (kRegisterA) cute::warpgroup_fence_operand(const_cast<A&>(tA));
  // Not for an accumulator about to be overwritten: the fence would read it, and a register that
  // is read before it is written stays allocated around the whole loop.
  if constexpr (kMode == Accumulate::kAdd) cute::warpgroup_fence_operand(tC);
  cute::warpgroup_arrive();
  mma.accumulate_ = kMode == Accumulate::kOverwrite || !keep ? cute::GMMA::ScaleOut::Zero
                                                             : cute::GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(tA); ++k) {
    cute::gemm(mma, tA(cute::_, cute::_, k), tB(cute::_, cute::_, k), tC);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(tC);
  if constexpr (kRegisterA) cute::warpgroup_fence_operand(const_cast<A&>(tA));
}

// As issue_mma with Accumulate::kOverwrite, C = A * B + A' * B' in one group. All operands are in
// shared memory, A' and B' have one k-step.
template <class Mma, class A, class B, class Mma2, class A2, class B2, class C>
CUTE_DEVICE void issue_mma(Mma mma, const A& tA, const B& tB, Mma2 mma2, const A2& tA2,
                           const B2& tB2, C& tC) {
  cute::warpgroup_arrive();
  mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(tA); ++k) {
    cute::gemm(mma, tA(cute::_, cute::_, k), tB(cute::_, cute::_, k), tC);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  mma2.accumulate_ = cute::GMMA::ScaleOut::One;
  cute::gemm(mma2, tA2(cute::_, cute::_, 0), tB2(cute::_, cute::_, 0), tC);
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(tC);
}

// Waits until at most kPending groups are in flight, and makes `tC` readable.
template <int kPending, class C>
CUTE_DEVICE void wait_mma(C& tC) {
  cute::warpgroup_wait<kPending>();
  cute::warpgroup_fence_operand(tC);
}

// Writes a warpgroup's accumulator, already rounded to 16 bits, to a tile in shared memory, from
// `row` on, a multiple of 16. Addresses of the columns differ by an exclusive or with a constant,
// so that a thread works out one.
template <class Tile, class Rounded>
CUTE_DEVICE void store_rounded(const Rounded& rounded, typename Tile::Element* tile, int row) {
  static_assert(sizeof(typename Tile::Element) == 2);
  constexpr int kStepCols = 16, kStepBytes = 2 * kStepCols;
  constexpr int kSteps = decltype(cute::size(rounded))::value / 8;
  // Read anew: an address kept across a loop would take a register that others need.
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  thread %= kWarpgroupThreads;
  const unsigned first_row = row + thread / 32 * 16 + thread % 16;
  unsigned offset = first_row * Tile::kChunkBytes + thread % 32 / 16 * 16;
  offset ^= offset >> 3 & (Tile::kChunkBytes - 16);  // the swizzle
  const std::uint32_t address = cute::cast_smem_ptr_to_uint(tile) + offset;
  const auto* const words = reinterpret_cast<const std::uint32_t*>(&rounded(0));
  CUTE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = step * kStepCols / Tile::kChunkCols;
    store_matrices(
        (address ^ step * kStepBytes % Tile::kChunkBytes) + chunk * Tile::kChunkElements * 2,
        words + 4 * step);
  }
}

// Rounds an accumulator to the tile's 16 bits and writes it there.
template <class Tile, class Accumulator>
CUTE_DEVICE void store_accumulator(const Accumulator& tC, typename Tile::Element* tile, int row) {
  auto rounded = cute::make_tensor_like<typename Tile::Element>(tC);
  convert(tC, rounded);
  store_rounded<Tile>(rounded, tile, row);
}

// Operands of a one-warpgroup MMA: descriptors of a shared-memory tensor.
template <class Mma, class Tensor>
CUTE_DEVICE auto operand_a(Mma mma, const Tensor& sA) {
  return mma.get_slice(0).partition_fragment_A(sA);
}
template <class Mma, class Tensor>
CUTE_DEVICE auto operand_b(Mma mma, const Tensor& sB) {
  return mma.get_slice(0).partition_fragment_B(sB);
}

// The same operand in another tile, `bytes` further on in shared memory.
template <class Operand>
CUTE_DEVICE auto operand_at(const Operand& operand, int bytes) {
  constexpr int kDescriptorUnit = 16;  // bytes
  return cute::make_tensor(operand.data() + bytes / kDescriptorUnit, operand.layout());
}

}  // namespace jax_fa3
