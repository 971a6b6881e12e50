#include "kernels/forward_cached/call.h"

JFA_HANDLER(jax_fa3_forward_cached, jax_fa3::ForwardCachedCall);
