#include "kernels/backward/call.h"

JFA_HANDLER(jax_fa3_backward, jax_fa3::BackwardCall);
