// A row describes an array of a custom call. A family's call has a table of arrays for its operands
// and one for its results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <type_traits>

namespace jax_fa3 {

enum class Element {
  kInput,   // that of query
  kOutput,  // that of out
  kFloat32,
  kInt32,
  kByte,
  kBool,
  kAny,
};

// A row of call/operands.h.
struct Operand {
  std::string_view name;
  const char* dims;  // a letter or an extent each; null: any shape
  Element element;
  bool optional = false;
};

// The extents of a checked array, in the order of its row's dimensions.
using Dims = const std::int64_t*;

// One array of a family's table: its row, and how the problem takes it.
template <class Problem>
struct Array {
  const Operand* operand;
  void (*place)(Problem& problem, void* address, Dims dims);
  std::uintptr_t alignment = 0;  // bytes; 0: what elements of this kind are read and written by
};

// A table. It allocates nothing, because some calls choose rows by their attributes and so make a
// table at every execution.
template <class Problem>
class Arrays {
 public:
  Arrays() = default;
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

template <class Problem>
Arrays<Problem> joined(std::initializer_list<Arrays<Problem>> parts) {
  Arrays<Problem> all;
  for (const auto& part : parts) {
    for (const auto& array : part) all.push_back(array);
  }
  return all;
}

// An array of which the problem needs the address alone, in the member at the end of `kPath`.
template <class Problem, auto... kPath>
Array<Problem> pointer_to(const Operand& operand, std::uintptr_t alignment = 0) {
  const auto place = [](Problem& problem, void* address, Dims) {
    auto& pointer = (problem.*....*kPath);
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(address);
  };
  return {&operand, place, alignment};
}

}  // namespace jax_fa3
