// From XLA's buffers to a Problem, by a family's table of arrays: extents are read off the first
// arrays that have a dimension, and every other array must have the rank, element type and extents
// that follow from them.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "call/operands.h"
#include "call/problem.h"
#include "call/status.h"
#include "call/text.h"
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

// The arrays of one side of a call, as the attribute of that side has them: the names of their rows
// in the order of the buffers, with a space between.
class Names {
 public:
  Names() = default;
  explicit Names(std::string_view text) : text_(text) {}

  std::string_view text() const { return text_; }
  bool empty() const { return text_.empty(); }
  std::string_view front() const { return text_.substr(0, text_.find(' ')); }
  Names behind_front() const {
    const std::size_t end = text_.find(' ');
    return Names(end == text_.npos ? std::string_view() : text_.substr(end + 1));
  }

  bool has(const Operand& operand) const {
    for (Names rest = *this; !rest.empty(); rest = rest.behind_front()) {
      if (rest.front() == operand.name) return true;
    }
    return false;
  }

 private:
  std::string_view text_;
};

// The words that a family's table is written in.
template <class Problem_>
struct ArrayTable {
  using Problem = Problem_;

  // array<&Problem::query>(operands::kQuery)
  template <auto... kPath>
  static Array<Problem> array(const Operand& operand, std::uintptr_t alignment = 0) {
    return pointer_to<Problem, kPath...>(operand, alignment);
  }
  static Array<Problem> workspace(std::uintptr_t alignment) {
    const auto place = [](Problem& problem, void* address, Dims dims) {
      problem.workspace = address;
      problem.workspace_bytes = dims[0];
    };
    return {&operands::kWorkspace, place, alignment};
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

// Why `names` are not arrays of a table: `rest` of them stand where the table must have `next`, or,
// if that is null, ends.
Status wrong_names(const char* side, Names names, Names rest, const Operand* next);

// The arrays of a table that a call names: those that it must have, and any of the others.
template <class Problem>
StatusOr<Arrays<Problem>> named(const Arrays<Problem>& table, const char* side, Names names) {
  Arrays<Problem> found;
  Names rest = names;
  for (const auto& array : table) {
    if (rest.front() == array.operand->name) {
      found.push_back(array);
      rest = rest.behind_front();
    } else if (!array.operand->optional) {
      return wrong_names(side, names, rest, array.operand);
    }
  }
  if (!rest.empty()) return wrong_names(side, names, rest, nullptr);
  return found;
}

enum class Addresses { kChecked, kUnchecked };

// One side of a call, "operands" or "results", into the problem.
template <class Problem, class Buffers>
Status take_all(const Arrays<Problem>& table, Names names, const Buffers& buffers, const char* side,
                Addresses addresses, Extents& extents, Problem& problem) {
  JFA_TRY(arrays, named(table, side, names));
  if (buffers.size() != arrays.size()) {
    return invalid_argument(concat(side, " names ", arrays.size(), " arrays, got ", buffers.size(),
                                   ": '", names.text(), "'"));
  }
  std::size_t next = 0;
  for (const auto& array : arrays) {
    auto got = buffers.template get<xla::ffi::AnyBuffer>(next++);
    if (!got.has_value()) {
      return invalid_argument(concat(array.operand->name, " must be a buffer"));
    }
    const xla::ffi::AnyBuffer buffer = buffer_of(*got);
    JFA_CHECK_OK(extents.take(*array.operand, buffer));
    if (addresses == Addresses::kChecked) {
      JFA_CHECK_OK(check_aligned(*array.operand, array.alignment, buffer.untyped_data()));
    }
    array.place(problem, buffer.untyped_data(), buffer.dimensions().begin());
  }
  return {};
}

// The Problem of a call of `Family`, whose table is
//   check(attributes)                        which values are legal, as far as attributes tell
//   types(attributes)
//   operands(attributes)                     all that it may have, in the order of the custom call
//   results(attributes)
//   fill(attributes, extents, problem)       what no array says by itself
//
// and whose attributes name the call's `operands` and `results`.
template <class Family>
StatusOr<typename Family::Problem> decode(const xla::ffi::RemainingArgs& args,
                                          const xla::ffi::RemainingRets& rets,
                                          const typename Family::Attributes& attributes,
                                          Addresses addresses) {
  JFA_CHECK_OK(Family::check(attributes));
  Extents extents(Family::types(attributes));
  typename Family::Problem problem;
  JFA_CHECK_OK(take_all(Family::operands(attributes), attributes.operands, args, "operands",
                        addresses, extents, problem));
  JFA_CHECK_OK(take_all(Family::results(attributes), attributes.results, rets, "results", addresses,
                        extents, problem));
  problem.shape = extents.shape();
  Family::fill(attributes, extents, problem);
  return problem;
}

}  // namespace jax_fa3

// A string attribute.
template <>
struct xla::ffi::AttrDecoding<jax_fa3::Names> {
  using Type = jax_fa3::Names;
  static std::optional<Type> Decode(XLA_FFI_AttrType type, void* attr,
                                    DiagnosticEngine& diagnostic) {
    const auto text = AttrDecoding<std::string_view>::Decode(type, attr, diagnostic);
    if (!text.has_value()) return std::nullopt;
    return Type(*text);
  }
};
