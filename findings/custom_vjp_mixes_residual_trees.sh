#!/usr/bin/env bash
# custom_vjp with symbolic zeros: the backward rule may get the residuals' tree of another forward rule.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6; CPU.
# Expected: a forward rule that puts a static record of what is perturbed among its residuals (a
#   pytree without leaves) finds the same record in the backward rule.
# Seen: where one jitted call is differentiated twice, by different arguments, and both forward
#   passes come before a backward pass, both backward rules get the record of the later one. A rule
#   that leaves out what was not perturbed then gives a gradient of 0, without a warning. The extent
#   of an array among the residuals arrives as it was.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6 scipy==1.17.1 opt_einsum==3.4.0
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    y: bool


def product(in_the_tree):
    @jax.custom_vjp
    def function(x, y):
        return x * y

    def forward(x, y):
        wanted = Wanted(y.perturbed) if in_the_tree else jnp.zeros(1 if y.perturbed else 0)
        return x.value * y.value, (x.value, y.value, wanted)

    def backward(residuals, cotangent):
        x, y, wanted = residuals
        wants_y = wanted.y if in_the_tree else wanted.size > 0
        return cotangent * y, cotangent * x if wants_y else None

    function.defvjp(forward, backward, symbolic_zeros=True)
    return jax.jit(lambda x, y: 2 * function(x, y))


def gradients(in_the_tree):
    function = product(in_the_tree)
    _, of_both = jax.vjp(function, 5.0, 3.0)
    jax.vjp(lambda x: function(x, 3.0), 5.0)
    found = tuple(map(float, of_both(1.0)))
    print(f"record {'in the tree' if in_the_tree else 'as an extent'}: {found}, expected (6.0, 10.0)")
    return found


assert gradients(in_the_tree=False) == (6.0, 10.0)
assert gradients(in_the_tree=True) == (6.0, 0.0)
PYTHON
