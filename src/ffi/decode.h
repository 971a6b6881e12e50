// From XLA's buffers to a Problem, by a family's table of arrays: extents are read off the first
// arrays that have a dimension, and every other array must have the rank, element type and extents
// that follow from them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

#include "call/cache.h"
#include "call/operands.h"
#include "call/problem.h"
#include "call/status.h"
#include "ffi/error.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

// What a family's calls say of the arrays' types.
struct Types {
  using DataType = xla::ffi::DataType;
  static constexpr DataType kAny16Bit = DataType::INVALID;  // as the first array has it

  DataType input = kAny16Bit;
  std::optional<DataType> output;   // none: that of the input
  bool descale_each_block = false;  // or all rows of a head may share a scale

  // Extents that attributes say; -1: arrays do.
  std::int64_t seqlen_q = -1;
  std::int64_t seqlen_k = -1;
};

// One array of a family's table: what it is, and where its address goes.
template <class Problem>
struct Array {
  const Operand* operand;
  void (*store)(Problem&, void* address);
  bool present;
  std::uintptr_t alignment;  // bytes; 0: what elements of this kind are read and written by
};

// A table, made anew at every call: without allocations.
template <class Problem>
class Arrays {
 public:
  Arrays(std::initializer_list<Array<Problem>> arrays) {
    for (const auto& array : arrays) push_back(array);
  }
  void push_back(const Array<Problem>& array) { arrays_[size_++] = array; }
  const Array<Problem>* begin() const { return arrays_; }
  const Array<Problem>* end() const { return arrays_ + size_; }

 private:
  static constexpr std::size_t kCapacity = 28;
  Array<Problem> arrays_[kCapacity];
  std::size_t size_ = 0;
};

// The words that a family's table is written in: array<&Problem::query>(operands::kQuery).
template <class Problem_>
struct ArrayTable {
  using Problem = Problem_;

  template <auto kMember>
  static Array<Problem> array(const Operand& operand, bool present = true,
                              std::uintptr_t alignment = 0) {
    return {&operand, &store<kMember>, present, alignment};
  }
  template <auto kMember>
  static Array<Problem> workspace(std::uintptr_t alignment) {
    return array<kMember>(operands::kWorkspace, true, alignment);
  }

  // The index arrays of any call of attention, behind its other operands.
  template <class Options>
  static Arrays<Problem> with_index(Arrays<Problem> arrays, const Options& options) {
    using Index = IndexArrays;
    arrays.push_back(
        array<&Index::query_lengths>(operands::kQueryLengths, options.has_query_lengths));
    arrays.push_back(array<&Index::key_lengths>(operands::kKeyLengths, options.has_key_lengths));
    arrays.push_back(array<&Index::query_offset>(operands::kQueryOffset, options.has_query_offset));
    arrays.push_back(array<&Index::visibility>(operands::kVisibility, options.has_visibility,
                                               kVisibilityAlignment));
    return arrays;
  }

  // Those, and what else a call in 16 bits may have.
  template <class Options>
  static Arrays<Problem> with_all(Arrays<Problem> arrays, const Options& options) {
    arrays = with_index(arrays, options);
    arrays.push_back(array<&DenseArrays::bias>(operands::kBias, options.has_bias));
    arrays.push_back(array<&DenseArrays::mask>(operands::kDenseMask, options.has_dense_mask));
    arrays.push_back({&operands::kSinks, &store_table<&CallProblem::sinks>, options.has_sinks, 0});
    arrays.push_back({&operands::kAlibiSlopes, &store_table<&CallProblem::alibi_slopes>,
                      options.has_alibi_slopes, 0});
    return arrays;
  }

  // What a score function of `num_captured` arrays takes, behind those.
  static Arrays<Problem> with_function(Arrays<Problem> arrays, bool has_block_states,
                                       int num_captured) {
    using Function = FunctionArrays;
    arrays.push_back(array<&Function::batch_numbers>(operands::kBatchNumber));
    arrays.push_back(array<&Function::head_numbers>(operands::kHeadNumber));
    arrays.push_back(array<&Function::blocks>(operands::kBlockStates, has_block_states));
    for (int i = 0; i < num_captured; ++i) {
      arrays.push_back({&operands::kCaptured, kStoreCaptured[i], true, 0});
    }
    return arrays;
  }

 protected:
  static constexpr std::uintptr_t kVisibilityAlignment = 16;  // bytes: it is read in fours of words

 private:
  template <class T, class Class>
  static T& field(Problem& problem, T Class::*member) {
    return problem.*member;
  }
  template <class T>
  static T& field(Problem& problem, T IndexArrays::*member) {
    return problem.index.*member;
  }
  template <class T>
  static T& field(Problem& problem, T DenseArrays::*member) {
    return problem.dense.*member;
  }
  template <class T>
  static T& field(Problem& problem, T FunctionArrays::*member) {
    return problem.function.*member;
  }
  template <class T>
  static T& field(Problem& problem, T CachedIndex::*member) {
    return problem.index.*member;
  }
  template <auto kMember>
  static void store(Problem& problem, void* address) {
    auto& pointer = field(problem, kMember);
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(address);
  }
  template <int kNumber>
  static void store_captured(Problem& problem, void* address) {
    problem.function.captured.array[kNumber] = address;
  }
  static constexpr void (*kStoreCaptured[kMostCaptured])(Problem&, void*) = {
      &store_captured<0>, &store_captured<1>, &store_captured<2>, &store_captured<3>,
      &store_captured<4>, &store_captured<5>, &store_captured<6>, &store_captured<7>};
  template <HeadValues CallProblem::*kMember>
  static void store_table(Problem& problem, void* address) {
    (problem.*kMember).values = static_cast<const float*>(address);
  }
};

// What the arrays so far have said: the extent of each dimension, -1 where none has it yet.
class Extents {
 public:
  explicit Extents(const Types& types);

  // Checks a buffer, and takes from it what is not known yet.
  Status take(const Operand& operand, const xla::ffi::AnyBuffer& buffer);

  std::int64_t operator[](char letter) const { return extents_[index(letter)]; }

  // The dtype is that of out, or of query where there is no other.
  Shape shape() const;

  // Of a dense mask: 1 for all rows, or each has its own.
  std::int64_t mask_rows() const;

 private:
  static constexpr std::size_t kLetters = 'z' - 'A' + 1;
  static std::size_t index(char letter) { return static_cast<std::size_t>(letter - 'A'); }

  Status check_type(const Operand& operand, xla::ffi::DataType got);
  Status check_choice(const Operand& operand, char letter, std::int64_t extent) const;
  void learn(char letter, std::int64_t extent);
  std::int64_t mask_words(std::int64_t rows) const;

  Types types_;
  std::int64_t extents_[kLetters];
};

inline xla::ffi::AnyBuffer buffer_of(const xla::ffi::AnyBuffer& operand) { return operand; }
inline xla::ffi::AnyBuffer buffer_of(xla::ffi::Result<xla::ffi::AnyBuffer>& result) {
  return *result;
}

// What the kernels need of an array's address; `alignment` as in Array.
Status check_aligned(const Operand& operand, std::uintptr_t alignment, const void* address);

// Why a side of a call, "operands" or "results", has not the arrays that it should: of those that
// `options` announce, the first that is missing has a name.
Status wrong_count(const char* side, std::size_t got, std::size_t required, std::size_t announced,
                   const Operand* first_missing);

template <class Problem>
Status check_count(const Arrays<Problem>& arrays, const char* side, std::size_t got) {
  std::size_t required = 0, announced = 0, present = 0;
  const Operand* first_missing = nullptr;
  for (const auto& array : arrays) {
    required += !array.operand->optional;
    announced += array.operand->optional && array.present;
    present += array.present;
    const bool is_missing = array.operand->optional && array.present && present > got;
    if (is_missing && first_missing == nullptr) first_missing = array.operand;
  }
  if (got == present) return {};
  return wrong_count(side, got, required, announced, first_missing);
}

enum class Addresses { kChecked, kUnchecked };

// One side of a call into the problem.
template <class Problem, class Buffers>
Status take_all(const Arrays<Problem>& arrays, const Buffers& buffers, const char* side,
                Addresses addresses, Extents& extents, Problem& problem) {
  JFA_CHECK_OK(check_count(arrays, side, buffers.size()));
  std::size_t next = 0;
  for (const auto& array : arrays) {
    if (!array.present) continue;
    auto got = buffers.template get<xla::ffi::AnyBuffer>(next++);
    if (!got.has_value()) {
      return invalid_argument(std::string(array.operand->name) + " must be a buffer");
    }
    const xla::ffi::AnyBuffer buffer = buffer_of(*got);
    JFA_CHECK_OK(extents.take(*array.operand, buffer));
    if (addresses == Addresses::kChecked) {
      JFA_CHECK_OK(check_aligned(*array.operand, array.alignment, buffer.untyped_data()));
    }
    array.store(problem, buffer.untyped_data());
  }
  return {};
}

// The Problem of a call of `Family`, whose table is
//   check(attributes)                        what the attributes contradict by themselves
//   types(attributes)
//   operands(attributes)                     in the order of the custom call
//   results(attributes)
//   fill(attributes, extents, problem)       what is no address
template <class Family>
StatusOr<typename Family::Problem> decode(const xla::ffi::RemainingArgs& args,
                                          const xla::ffi::RemainingRets& rets,
                                          const typename Family::Attributes& attributes,
                                          Addresses addresses) {
  JFA_CHECK_OK(Family::check(attributes));
  Extents extents(Family::types(attributes));
  typename Family::Problem problem;
  JFA_CHECK_OK(
      take_all(Family::operands(attributes), args, "operands", addresses, extents, problem));
  JFA_CHECK_OK(take_all(Family::results(attributes), rets, "results", addresses, extents, problem));
  problem.shape = extents.shape();
  Family::fill(attributes, extents, problem);
  return problem;
}

}  // namespace jax_fa3
