// The units of scores: exponentials are of base 2, LSE and the caller's scale are natural.
#pragma once

namespace jax_fa3 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace jax_fa3
