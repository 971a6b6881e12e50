#include "kernels/forward/call.h"

JFA_HANDLER(jax_fa3_forward, jax_fa3::ForwardCall);
JFA_FUNCTION_HANDLER(jax_fa3_flex_forward, jax_fa3::FlexForwardCall);
