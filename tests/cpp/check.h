// What a host test needs: CHECK counts and reports, finish() ends main.
#pragma once

#include <cstdio>
#include <string>

namespace jax_fa3::test {

inline long checks = 0;
inline long failures = 0;

inline void check(bool ok, const char* what, const char* file, int line,
                  const std::string& detail = "") {
  ++checks;
  if (ok || ++failures > 20) return;
  std::printf("%s:%d: failed: %s %s\n", file, line, what, detail.c_str());
}

inline int finish() {
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace jax_fa3::test

#define CHECK(condition) ::jax_fa3::test::check((condition), #condition, __FILE__, __LINE__)

#define CHECK_DETAIL(condition, detail)                                        \
  do {                                                                         \
    if (condition) {                                                           \
      ++::jax_fa3::test::checks;                                               \
    } else {                                                                   \
      ::jax_fa3::test::check(false, #condition, __FILE__, __LINE__, (detail)); \
    }                                                                          \
  } while (0)

// The status's message must contain `part`.
#define CHECK_REFUSES(status, part)                                                   \
  CHECK_DETAIL(!(status).ok() && ::jax_fa3::test::contains((status).message(), part), \
               "got: " + (status).message())
