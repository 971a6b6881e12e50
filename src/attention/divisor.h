// Division by a number that a launch knows: a product and a shift, where the device's own division
// takes some twenty instructions that wait for each other.
#pragma once

#include "call/types.h"

namespace jax_fa3 {

// Divides 0 <= n < 2^31; what it makes of other numbers is of no use, and harmless. With
// 2^(s-1) < value <= 2^s the multiplier is 2^(31+s) / value, rounded up: it fits 32 bits, since
// value > 2^(s-1), and n times what was added by rounding is below 2^31 value <= 2^(31+s), so that
// no quotient reaches the next one.
class Divisor {
 public:
  Divisor() = default;
  JFA_HD constexpr Divisor(int value) : value_(value) {  // stands where the number did
    if (value < 1) return;                               // of nothing: never divided by
    int s = 0;
    while ((std::int64_t{1} << s) < value) ++s;
    shift_ = 31 + s;
    multiplier_ = static_cast<std::uint32_t>(((std::uint64_t{1} << shift_) + value - 1) / value);
  }

  JFA_HD constexpr operator int() const { return value_; }

  JFA_HD friend constexpr int operator/(int n, const Divisor& by) {
    return static_cast<int>(std::uint64_t{static_cast<std::uint32_t>(n)} * by.multiplier_ >>
                            by.shift_);
  }
  JFA_HD friend constexpr int operator%(int n, const Divisor& by) { return n - n / by * by.value_; }

 private:
  int value_ = 1;
  std::uint32_t multiplier_ = std::uint32_t{1} << 31;
  int shift_ = 31;
};

}  // namespace jax_fa3
