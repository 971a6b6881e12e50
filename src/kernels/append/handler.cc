#include "kernels/append/call.h"

JFA_HANDLER(jax_fa3_append, jax_fa3::AppendCall);
