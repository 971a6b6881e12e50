// From XLA's buffers to a Problem, by a family's table of arrays: extents are read off the first
// arrays that have a dimension, and every other array must have the rank, element type, extents and
// alignment that follow from them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

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
};

// One array of a family's table: what it is, and where its address goes.
template <class Problem>
struct Array {
  Operand operand;
  void (*store)(Problem&, void* address);
  bool present = true;
  std::uintptr_t alignment = 0;  // bytes; 0: what elements of this kind are read and written by
};

// The names that a family's table is written in: array<&Problem::query>(operands::kQuery).
template <class Problem_>
struct ArrayTable {
  using Problem = Problem_;

  template <auto kMember>
  static Array<Problem> array(const Operand& operand, bool present = true,
                              std::uintptr_t alignment = 0) {
    return {operand, &store<kMember>, present, alignment};
  }
  template <auto kMember>
  static Array<Problem> workspace(std::uintptr_t alignment) {
    return array<kMember>(operands::kWorkspace, true, alignment);
  }

 private:
  template <class T, class Class>
  static T& field(Problem& problem, T Class::*member) {
    return problem.*member;
  }
  template <class T>
  static T& field(Problem& problem, T IndexArrays::*member) {
    return problem.index.*member;
  }
  template <auto kMember>
  static void store(Problem& problem, void* address) {
    auto& pointer = field(problem, kMember);
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(address);
  }
};

// What the arrays so far have said: the extent of each dimension, -1 where none has it yet.
class Extents {
 public:
  explicit Extents(const Types& types);

  // Checks a buffer, and takes from it what is not known yet.
  Status take(const Operand& operand, const xla::ffi::AnyBuffer& buffer, std::uintptr_t alignment);

  std::int64_t operator[](char letter) const { return extents_[index(letter)]; }

  // The dtype is that of out, or of query where there is no other.
  Shape shape() const;

 private:
  static std::size_t index(char letter) { return static_cast<std::size_t>(letter - 'a'); }

  Status check_type(const Operand& operand, xla::ffi::DataType got);
  Status learn(const Operand& operand, char letter, std::int64_t extent);

  Types types_;
  std::int64_t extents_[26];
};

namespace internal {

// The buffers of one side of a call, one after the other.
template <class Buffers>
class Reader {
 public:
  Reader(const Buffers& buffers, const char* what) : buffers_(buffers), what_(what) {}

  template <class Problem>
  Status read(const Array<Problem>& array, Extents& extents, Problem& problem) {
    const Operand& operand = array.operand;
    optional_before_ += operand.optional && array.present;
    required_ += !operand.optional;
    if (!array.present) return {};
    if (next_ >= buffers_.size()) return missing(operand);
    auto buffer = get(next_++);
    if (!buffer.has_value()) return invalid_argument(std::string(operand.name) + " is no buffer");
    JFA_CHECK_OK(extents.take(operand, *buffer, array.alignment));
    array.store(problem, buffer->untyped_data());
    return {};
  }

  Status finish() const {
    if (next_ == buffers_.size()) return {};
    return invalid_argument("options announce " + std::to_string(optional_before_) + " optional " +
                            what_ + ", got " + std::to_string(buffers_.size() - required_));
  }

 private:
  std::optional<xla::ffi::AnyBuffer> get(std::size_t i) const {
    if constexpr (std::is_same_v<Buffers, xla::ffi::RemainingArgs>) {
      const auto buffer = buffers_.template get<xla::ffi::AnyBuffer>(i);
      return buffer.has_value() ? std::optional(*buffer) : std::nullopt;
    } else {
      auto result = buffers_.template get<xla::ffi::AnyBuffer>(i);
      return result.has_value() ? std::optional(**result) : std::nullopt;
    }
  }

  Status missing(const Operand& operand) const {
    const std::string got =
        ", got " + std::to_string(buffers_.size() - required_) + " optional " + what_;
    if (operand.optional) {
      return invalid_argument(std::string("options announce the operand ") + operand.name + got);
    }
    return invalid_argument(std::string(operand.name) + " is missing among the " + what_ +
                            ", got " + std::to_string(buffers_.size()));
  }

  const Buffers& buffers_;
  const char* what_;
  std::size_t next_ = 0, required_ = 0, optional_before_ = 0;
};

}  // namespace internal

// The Problem of a call of `Family`, whose table is
//   check(attributes)                        what the attributes contradict by themselves
//   types(attributes)
//   operands(attributes), results(attributes)   in the order of the custom call
//   fill(attributes, extents, problem)       what is no address
template <class Family>
StatusOr<typename Family::Problem> decode(const xla::ffi::RemainingArgs& args,
                                          const xla::ffi::RemainingRets& rets,
                                          const typename Family::Attributes& attributes) {
  JFA_CHECK_OK(Family::check(attributes));
  typename Family::Problem problem;
  Extents extents(Family::types(attributes));
  internal::Reader operands(args, "operands");
  for (const auto& array : Family::operands(attributes)) {
    JFA_CHECK_OK(operands.read(array, extents, problem));
  }
  JFA_CHECK_OK(operands.finish());
  internal::Reader results(rets, "results");
  for (const auto& array : Family::results(attributes)) {
    JFA_CHECK_OK(results.read(array, extents, problem));
  }
  JFA_CHECK_OK(results.finish());
  problem.shape = extents.shape();
  Family::fill(attributes, extents, problem);
  return problem;
}

}  // namespace jax_fa3
