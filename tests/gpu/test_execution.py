"""How the kernels run under XLA: dispatch, command buffers, transformations, one long sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernels import bits, spoil_free_memory

import jax_fa3
import tolerance
import transforms
from cases import Case
from jax_fa3 import dot_product_attention
from jax_fa3.operands import Operands
from jax_fa3.options import AttentionOptions, Routes
from jax_fa3.vjp import attend

CASE = Case(batch=2, seqlen_q=300, seqlen_k=300, heads_q=4, heads_kv=2, head_dim=64, causal=True)
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
KERNEL_ATTEND = functools.partial(transforms.attend, implementation="fa3")


def compiled_text(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def gradients(query, key, value, dout, **options):
    out, vjp = jax.vjp(functools.partial(dot_product_attention, **options), query, key, value)
    return out, *vjp(dout)


# --- dispatch -------------------------------------------------------------------------------------


def test_calls_run_on_the_kernels():
    query, key, value, dout, _ = CASE.inputs()
    assert jax_fa3.is_supported(query, key, value) is None
    text = compiled_text(gradients, query, key, value, dout)
    for direction in ("forward", "backward"):
        assert text.count(f'custom_call_target="jax_fa3_{direction}"') == 1
    assert "conditional" not in text


@pytest.mark.parametrize(
    "options",
    [
        dict(implementation="xla"),
        dict(bias=np.zeros((1, 1, 300, 300), np.float32)),
    ],
    ids=["xla", "float32 bias"],
)
def test_other_calls_run_through_xla(options):
    inputs = CASE.inputs()
    text = compiled_text(functools.partial(dot_product_attention, **options), *inputs[:3])
    assert "jax_fa3_forward" not in text
    text = compiled_text(dot_product_attention, *(x.astype(np.float32) for x in inputs[:3]))
    assert "jax_fa3_forward" not in text


def test_xla_and_kernels_agree():
    """The fallback on the same GPU is the same function."""
    inputs = CASE.inputs()
    exact, same = CASE.reference(inputs), CASE.reference(inputs, CASE.dtype)
    out = dot_product_attention(*inputs[:3], is_causal=True, implementation="xla")
    tolerance.check("out", out, exact.out, same.out)


# --- command buffers ------------------------------------------------------------------------------


def chain(query, key, value, length=6):
    """Calls in a row, enough for XLA to capture them into one command buffer."""
    for _ in range(length):
        query = dot_product_attention(query, key, value, is_causal=True, deterministic=True)
    return query


def chain_gradient(query, key, value):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(chain(*x).astype(jnp.float32))), argnums=(0, 1, 2))(
        query, key, value
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("function", [chain, chain_gradient], ids=["forward", "gradient"])
def test_command_buffers_change_no_bit(function, head_dim):
    """Four executions with buffers at other addresses and other contents each time."""
    captured = jax.jit(function)
    plain = jax.jit(function, compiler_options=NO_COMMAND_BUFFERS)
    kept = []
    for seed in range(4):
        case = Case(
            batch=2,
            seqlen_q=200,
            seqlen_k=200,
            heads_q=4,
            heads_kv=2,
            head_dim=head_dim,
            scale=0.1 + seed,
        )  # another name, hence other numbers
        inputs = [jax.device_put(x) for x in case.inputs()[:3]]
        kept.append(inputs)  # so that the next ones lie elsewhere
        spoil_free_memory([x.nbytes for x in inputs])
        want = bits(plain(*inputs))
        for _ in range(2):
            assert bits(captured(*inputs)) == want


# --- the softmax's exact mode ---------------------------------------------------------------------


@pytest.mark.parametrize("slope", ["rising", "falling", "spikes"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_exact_rescaling(head_dim, slope):
    """Row maxima that grow along the keys; the output rescaled always, and only when needed."""
    case = Case(batch=1, seqlen_q=200, seqlen_k=1000, heads_q=2, heads_kv=2, head_dim=head_dim)
    query, key, value, dout, dlse = case.inputs()
    size = {
        "rising": np.linspace(0.1, 6, 1000),
        "falling": np.linspace(6, 0.1, 1000),
        "spikes": np.where(np.arange(1000) % 177 == 50, 8.0, 0.3),
    }[slope]
    key = (key * size[None, :, None, None]).astype(case.dtype)
    inputs = query, key, value, dout, dlse
    exact, same = case.reference(inputs), case.reference(inputs, case.dtype)
    for threshold in (0.0, 8.0):
        options = AttentionOptions(
            scale=case.softmax_scale,
            rescale_threshold=threshold,
            routes=Routes("fa3", "fa3"),
            return_residual=True,
        )
        outputs = jax.jit(functools.partial(attend, options))(Operands(query, key, value))
        out, lse = outputs.out, outputs.lse
        tolerance.check(f"out, threshold {threshold}", out, exact.out, same.out)
        tolerance.check(f"lse, threshold {threshold}", jnp.swapaxes(lse, 1, 2), exact.lse, same.lse)


# --- transformations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes",
    [
        (0,) * 6,
        (0, None, None, None, None, None),
        (None, 0, 0, None, 0, None),
        (1, 2, 3, 0, None, 0),
    ],
)
def test_vmap(axes):
    """A mapped call is the calls one by one."""
    x = [
        one if axis is None else np.moveaxis(three, 0, axis)
        for one, three, axis in zip(
            transforms.operands(),
            transforms.stacked_operands(3),
            axes,
            strict=True,
        )
    ]
    mapped = jax.jit(jax.vmap(KERNEL_ATTEND, in_axes=axes))(*x)
    mapped_gradient = jax.jit(jax.vmap(transforms.gradient, in_axes=axes))(*x)
    for i in range(3):
        single = [
            a if axis is None else np.take(a, i, axis) for a, axis in zip(x, axes, strict=True)
        ]
        want = jax.jit(KERNEL_ATTEND)(*single), jax.jit(transforms.gradient)(*single)
        got = jax.tree.map(lambda a, i=i: a[i], (mapped, mapped_gradient))
        transforms.assert_near(got, want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    x = transforms.operands()
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    specs = dict(mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)
    got = jax.jit(jax.shard_map(KERNEL_ATTEND, **specs))(*x)
    assert bits(got) == bits(jax.jit(KERNEL_ATTEND)(*x))
    got = jax.jit(jax.shard_map(transforms.gradient, **specs))(*x)
    transforms.assert_near(got, jax.jit(transforms.gradient)(*x))


def test_scan_with_remat():
    """Layers in a scan, the residuals saved by name; against the XLA implementation."""
    query, key, value, *_ = (jnp.asarray(x) for x in CASE.inputs())

    def total(implementation, query, key, value):
        def layer(carry, _):
            out = dot_product_attention(
                carry, key, value, is_causal=True, deterministic=True, implementation=implementation
            )
            return carry + out, None

        policy = jax.checkpoint_policies.save_only_these_names("context")
        out, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), query, length=4)
        return jnp.mean(jnp.sin(out.astype(jnp.float32))) * 100

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(total, name), argnums=(0, 1, 2)))(query, key, value)
        for name in ("fa3", "xla")
    )
    transforms.assert_near(ours, theirs, relative=0.03)


def attention_layer(parameters, x, implementation):
    """A multi-head attention layer with grouped keys, as a model has it."""

    def project(name, heads):
        return jnp.einsum("bsm,mhd->bshd", x, parameters[name].astype(x.dtype)[:, :heads])

    out = dot_product_attention(
        project("query", 8),
        project("key", 2),
        project("value", 2),
        is_causal=True,
        implementation=implementation,
    )
    return x + jnp.einsum("bshd,hdm->bsm", out, parameters["out"].astype(x.dtype))


def test_training_step_of_a_layer():
    """float32 parameters, bfloat16 activations, gradients near those of the XLA implementation."""
    keys = jax.random.split(jax.random.key(0), 5)
    parameters = {
        name: jax.random.normal(key, (256, 8, 64)) / 16
        for name, key in zip(("query", "key", "value"), keys[:3], strict=True)
    }
    parameters["out"] = jax.random.normal(keys[3], (8, 64, 256)) / 23
    x = jax.random.normal(keys[4], (2, 333, 256), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=2)
    def step(parameters, x, implementation):
        def loss(parameters):
            y = attention_layer(parameters, x, implementation)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        return jax.value_and_grad(loss)(parameters)

    (loss, ours), (other_loss, theirs) = (step(parameters, x, name) for name in (None, "xla"))
    assert "jax_fa3_backward" in step.lower(parameters, x, None).compile().as_text()
    assert abs(loss - other_loss) < 1e-3 * other_loss
    transforms.assert_near(ours, theirs, relative=0.02)
