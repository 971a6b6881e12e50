#include "kernels/backward/call.h"

JFA_HANDLER(jax_fa3_backward, jax_fa3::BackwardCall);
JFA_FUNCTION_HANDLER(jax_fa3_flex_backward, jax_fa3::FlexBackwardCall);
