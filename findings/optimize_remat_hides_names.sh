#!/usr/bin/env bash
# custom_vjp(..., optimize_remat=True) hides the names of its residuals from checkpoint policies.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6; CPU.
# Expected: optimize_remat drops a forward rule whose residuals are not used; it does not change
#   which values a policy such as save_only_these_names can save.
# Seen: without it, the value named in the forward rule is saved and the costly function (here:
#   sine) runs once in a step. With it, the same policy saves only the argument of the checkpointed
#   function, and the function runs twice, without a warning. A name around the call does not bring
#   the count back, because the forward rule runs again for its residuals.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6 scipy==1.17.1 opt_einsum==3.4.0
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import contextlib
import io
import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals


def costly(optimize_remat):
    @jax.custom_vjp
    def function(x):
        return jnp.sin(x)

    def forward(x):
        out = checkpoint_name(jnp.sin(x), "costly_out")
        return out, out

    def backward(out, cotangent):
        return (cotangent * jnp.sqrt(1 - out * out),)

    function.defvjp(forward, backward, optimize_remat=optimize_remat)
    return function


def step(optimize_remat, name_outside):
    function = costly(optimize_remat)

    def loss(x):
        out = function(x * 2)
        return (checkpoint_name(out, "costly_out") if name_outside else out).sum()

    policy = jax.checkpoint_policies.save_only_these_names("costly_out")
    loss = jax.checkpoint(loss, policy=policy)
    x = jnp.full(3, 0.1)
    text = jax.jit(jax.value_and_grad(loss)).lower(x).as_text()
    runs = len(re.findall(r"stablehlo\.sine\b", text))
    with contextlib.redirect_stdout(io.StringIO()) as residuals:
        print_saved_residuals(loss, x)
    saved = "costly_out" in residuals.getvalue()
    print(f"optimize_remat={optimize_remat!s:5} name outside={name_outside!s:5}: "
          f"sine {runs} times, named value saved: {saved}")
    return runs, saved


results = [step(o, n) for o, n in ((False, False), (True, False), (True, True))]
assert results == [(1, True), (2, False), (2, False)]
PYTHON
