// What a kernel family is on the host. Its folder has a family.h with a struct of
//
//   kName            the folder's name
//   Key              what identifies one of its kernels; Config::kKey for each row of the matrix
//   Plan, Problem    a Plan has the key of the kernel to launch
//   launch<Config>   tensor maps, parameters, launch; launch.cuh defines it, one generated unit for
//                    each head dim instantiates it
//   describe         a Key's and a Plan's fields, for Python
//
// and CMake generates, from cmake/kernel_matrix.cmake, the members of KernelTable that name
// Configs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "call/status.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; host-only builds have no CUDA headers

namespace jax_fa3 {

using Fields = std::vector<std::pair<const char*, std::variant<bool, std::int64_t, const char*>>>;

inline Fields joined(std::initializer_list<Fields> parts) {
  Fields all;
  for (const Fields& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

template <class Family>
struct KernelTable {
  using Key = typename Family::Key;

  // Every kernel of cmake/kernel_matrix.cmake, in its order.
  static const std::vector<Key>& listed();

  // Those linked into this build.
  static const std::vector<Key>& compiled();

  // What plans choose from: the compiled kernels, or all listed ones in a build without any, so
  // that such a build can still lower calls for a GPU elsewhere.
  static const std::vector<Key>& plannable();

  // Launches plan.key's kernel. Defined in builds with kernels.
  static Status launch(const typename Family::Plan& plan, const typename Family::Problem& problem,
                       CUstream_st* stream);
};

// The keys of Configs, no two of them equal.
template <class Key, class... Configs>
std::vector<Key> keys_of() {
  constexpr std::size_t kSize = sizeof...(Configs);
  constexpr auto unique = [] {
    const Key keys[kSize + 1] = {Configs::kKey...};
    for (std::size_t i = 0; i < kSize; ++i) {
      for (std::size_t j = i + 1; j < kSize; ++j) {
        if (keys[i] == keys[j]) return false;
      }
    }
    return true;
  };
  static_assert(unique(), "two kernels claim the same key");
  return {Configs::kKey...};
}

template <class Family, class... Configs>
Status launch_one_of(const typename Family::Plan& plan, const typename Family::Problem& problem,
                     CUstream_st* stream) {
  using Launch =
      Status (*)(const typename Family::Plan&, const typename Family::Problem&, CUstream_st*);
  constexpr std::size_t kSize = sizeof...(Configs);
  constexpr typename Family::Key kKeys[kSize + 1] = {Configs::kKey...};
  constexpr Launch kLaunches[kSize + 1] = {&Family::template launch<Configs>...};
  for (std::size_t i = 0; i < kSize; ++i) {
    if (kKeys[i] == plan.key) return kLaunches[i](plan, problem, stream);
  }
  return internal_error(std::string(Family::kName) + ": no compiled kernel for " + to_string(plan));
}

}  // namespace jax_fa3
