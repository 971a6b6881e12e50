#include "kernels/visibility/call.h"

JFA_HANDLER(jax_fa3_visibility, jax_fa3::VisibilityCall);
