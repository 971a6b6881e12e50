// The types that a score function has in common with the kernel it is linked into. The function's
// text has the same (jax_fa3/flex/text.py), and LTO inlines a call only where both sides agree.
#pragma once

constexpr int kMostCaptured = 8;

// The arrays that a function reads; the function knows their shapes.
struct JfaCaptured {
  const void* array[kMostCaptured];
};

struct JfaScore {
  float score;
  float slope;  // its derivative by the score that the function was given
};
