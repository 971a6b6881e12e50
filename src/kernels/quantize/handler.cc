#include "kernels/quantize/call.h"

JFA_HANDLER(jax_fa3_quantize, jax_fa3::QuantizeCall);
