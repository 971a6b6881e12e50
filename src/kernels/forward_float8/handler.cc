#include "kernels/forward_float8/call.h"

JFA_HANDLER(jax_fa3_forward_float8, jax_fa3::ForwardFloat8Call);
