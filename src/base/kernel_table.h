// The generated kernel lists (cmake/kernel_matrix.cmake) as constexpr arrays. A generated .inc file
// is a list of Config types, each after a comma, so that an empty list is valid too:
//
//   constexpr auto kKeys = keys_of<ForwardKey
//   #include "forward_listed.inc"
//   >();
#pragma once

#include <array>
#include <cstddef>

namespace jax_fa3 {

template <class Key, class... Configs>
constexpr std::array<Key, sizeof...(Configs)> keys_of() {
  return {Configs::kKey...};
}

template <class Key, std::size_t kSize>
constexpr bool keys_are_unique(const std::array<Key, kSize>& keys) {
  for (std::size_t i = 0; i < kSize; ++i) {
    for (std::size_t j = i + 1; j < kSize; ++j) {
      if (keys[i] == keys[j]) return false;
    }
  }
  return true;
}

}  // namespace jax_fa3
