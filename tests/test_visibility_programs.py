"""How often a model's program makes its table: compiled for an H200 where JAX's CUDA plugin is
installed, which needs no GPU; lowered for CUDA where not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import h200
import jax_fa3
from programs import custom_calls

LAYERS = 8
NAMED = jax.checkpoint_policies.save_only_these_names("context")


def loss(direct, scanned, policy, x, weights, ids):
    """Of a model whose layers are rematerialised; each makes its own table, or all have one."""
    told = dict(query_segment_ids=ids)
    if not direct:
        told = dict(visibility=jax_fa3.make_visibility(ids))

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x, weight):
        out = jax_fa3.dot_product_attention(x @ weight, x, x, is_causal=True, **told)
        return x + out, None

    if scanned:
        x, _ = jax.lax.scan(layer, x, weights)
    else:
        for weight in weights:
            x, _ = layer(x, weight)
    return x.astype(jnp.float32).sum()


def traced(direct, scanned, policy, sharding=None):
    types = (((1, 512, 4, 64), "bfloat16"), ((LAYERS, 64, 64), "bfloat16"), ((1, 512), "int32"))
    x = [jax.ShapeDtypeStruct(*kind, sharding=sharding) for kind in types]
    gradient = jax.grad(functools.partial(loss, direct, scanned, policy), (0, 1))
    return jax.jit(gradient).trace(*x)


@pytest.mark.parametrize("policy", [None, NAMED], ids=["remat", "named"])
@pytest.mark.parametrize("scanned", [True, False], ids=["scan", "unrolled"])
def test_a_table_made_before_is_made_once(scanned, policy):
    text = traced(False, scanned, policy).lower(lowering_platforms=("cuda",)).as_text()
    assert [target for target, *_ in custom_calls(text)].count("jax_fa3_visibility") == 1


@pytest.fixture(scope="module")
def an_h200():
    """A sharding on an H200 that is not here."""
    return NamedSharding(Mesh(np.array(h200.devices(1)), ("x",)), P())


@pytest.mark.parametrize(
    ("direct", "scanned", "policy", "tables"),
    [
        (False, True, None, 1),
        (False, True, NAMED, 1),
        (False, False, None, 1),
        (True, True, NAMED, 1),  # XLA takes it out of the loops
        (True, False, NAMED, 1),
        (True, True, None, 2),  # one for each of the loops, forward and backward
    ],
)
def test_compiled_for_an_h200(an_h200, direct, scanned, policy, tables):
    text = traced(direct, scanned, policy, an_h200).lower().compile().as_text()
    counts = {name: len(re.findall(f'custom_call_target="{name}"', text)) for name in h200.TARGETS}
    assert counts["jax_fa3_visibility"] == tables
    assert counts["jax_fa3_backward"] == (1 if scanned else LAYERS)
