#include "kernels/dense_mask/call.h"

JFA_HANDLER(jax_fa3_dense_mask, jax_fa3::DenseMaskCall);
