"""jax_fa3.flax inside Flax's own layers, against Flax's own attention."""

import functools
import inspect
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jax_fa3
import tolerance
from decoder import Config
from jax_fa3.flax import attention_fn, make_attention_fn
from training import build
from transforms import assert_near

HEADS, WIDTH, SEQLEN = 4, 32, 21
LENGTHS = np.array([13, 21], np.int32)

pytestmark = pytest.mark.usefixtures("forward_kernel_alone")


class LinenModel(linen.Module):
    """Normalised self-attention beside a residual."""

    attention_fn: object
    dtype: object = None
    decode: bool = False

    @linen.compact
    def __call__(self, x, **options):
        layer = linen.MultiHeadDotProductAttention(
            HEADS, dtype=self.dtype, decode=self.decode, attention_fn=self.attention_fn
        )
        return x + layer(linen.LayerNorm()(x), **options)


class NnxModel(nnx.Module):
    """The same in nnx, with grouped key/value heads."""

    def __init__(self, attention_fn, dtype=None, decode=False):
        rngs = nnx.Rngs(0)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.layer = nnx.MultiHeadAttention(
            HEADS, WIDTH, num_kv_heads=2, dtype=dtype, decode=decode,
            attention_fn=attention_fn, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x, **options):
        return x + self.layer(self.norm(x), **options)


def linen_model(attention_fn, dtype=None):
    """A pure apply(parameters, x, **options), and the model's own first parameters."""
    model = LinenModel(attention_fn, dtype)
    return model.apply, jax.jit(model.init)(jax.random.key(0), inputs())


def nnx_model(attention_fn, dtype=None):
    graph, parameters = nnx.split(NnxModel(attention_fn, dtype))
    return lambda parameters, x, **options: nnx.merge(graph, parameters)(x, **options), parameters


BUILD = {"linen": linen_model, "nnx": nnx_model}
FLAX = {"linen": linen.dot_product_attention, "nnx": nnx.dot_product_attention}


def inputs(seqlen=SEQLEN):
    return np.random.default_rng(0).standard_normal((2, seqlen, WIDTH), np.float32)


def heads_of(batch, seqlen=9, dtype="float32"):
    """query, key, value: [*batch, seqlen, HEADS, 8]."""
    rng, shape = np.random.default_rng(1), (*batch, seqlen, HEADS, 8)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3)]


def band(seqlen, left):
    """Which keys a row sees: its own and `left` before it."""
    return np.tri(seqlen, dtype=np.float32) - np.tri(seqlen, k=-left - 1, dtype=np.float32)


TOKENS = np.arange(SEQLEN) < LENGTHS[:, None]
CAUSAL = linen.make_causal_mask(TOKENS)
DOCUMENTS = np.where(TOKENS, 1 + (np.arange(SEQLEN) >= np.array([[6], [12]])), 0)
MASKS = {  # as Flax's helpers make them
    None: None,
    "causal": CAUSAL,
    "padding": linen.make_attention_mask(np.ones((2, 1)), TOKENS),
    "causal padding": linen.combine_masks(CAUSAL, linen.make_attention_mask(TOKENS, TOKENS)),
    "window": band(SEQLEN, 4)[None, None],
    "documents": linen.make_attention_mask(DOCUMENTS, DOCUMENTS, np.equal),
}


def results(flavour, attention, dtype, mask, **options):
    """The model's parameters; its output and gradients over the rows that are no padding."""
    apply, parameters = BUILD[flavour](attention, dtype)
    options |= {} if mask is None else dict(mask=MASKS[mask])

    def loss(parameters, x):
        out = jnp.where(TOKENS[..., None], apply(parameters, x, **options), 0)
        return jnp.sum(jnp.sin(3 * out.astype(jnp.float32))), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, out = run(parameters, inputs())
    return jax.tree.leaves(parameters), [out, *jax.tree.leaves(gradients)]


@functools.cache
def flax_results(flavour, dtype, mask, **options):
    return results(flavour, FLAX[flavour], dtype, mask, **options)


def check(flavour, ours, dtype, mask, flax_mask, ours_options=None, flax_options=None):
    """By the tolerance rule: exact is Flax's attention in float32, same is Flax's in dtype."""
    parameters, got = results(flavour, ours, dtype, mask, **ours_options or {})
    own_parameters, same = flax_results(flavour, dtype, flax_mask, **flax_options or {})
    _, exact = flax_results(flavour, "float32", flax_mask, **flax_options or {})
    for a, b in zip(parameters, own_parameters, strict=True):
        np.testing.assert_array_equal(a, b)
    for i, leaves in enumerate(zip(got, exact, same, strict=True)):
        tolerance.check(f"result {i}", *leaves)


CASES = {  # the attention function, the mask beside it, and the mask that says the same to Flax
    "plain": (attention_fn, None, None),
    "dense": (attention_fn, "causal padding", "causal padding"),
    "causal": (make_attention_fn(is_causal=True), None, "causal"),
    "padding": (make_attention_fn(padding_mask=True), "padding", "padding"),
    "causal padding": (
        make_attention_fn(is_causal=True, padding_mask=True),
        "padding",
        "causal padding",
    ),
    "lengths": (
        make_attention_fn(is_causal=True, key_value_seq_lengths=LENGTHS),
        None,
        "causal padding",
    ),
    "window": (make_attention_fn(local_window_size=(4, 0)), None, "window"),
    "documents": (make_attention_fn(query_segment_ids=DOCUMENTS), None, "documents"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("flavour", BUILD)
def test_model_equals_flax(flavour, case):
    check(flavour, CASES[case][0], "bfloat16", *CASES[case][1:])


@pytest.mark.parametrize("case", ["dense", "causal padding"])
@pytest.mark.parametrize("flavour", BUILD)
def test_model_equals_flax_in_float32(flavour, case):
    check(flavour, CASES[case][0], "float32", *CASES[case][1:])


@pytest.mark.parametrize("mask", [None, "padding"])
def test_is_causal_of_the_call(mask):
    """nnx has a word for it, beside which a mask may stand."""
    flax_mask = "causal padding" if mask else "causal"
    check("nnx", attention_fn, "bfloat16", mask, flax_mask, dict(is_causal=True))


def test_options_hold_where_nnx_passes_its_default():
    """is_causal set beforehand is not undone by the False that comes with each call."""
    causal = make_attention_fn(is_causal=True)
    check("nnx", causal, "bfloat16", None, "causal", dict(is_causal=False))


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3), (0, 2)])
def test_any_batch_dimensions(batch):
    """Dense arrays, lengths and offsets with all batch dimensions, some of them, or none."""
    x, rng = heads_of(batch), np.random.default_rng(2)
    some = [n if i % 2 else 1 for i, n in enumerate(batch)]
    bias = rng.standard_normal((*some, 1, 9, 9), np.float32)
    for mask in (
        rng.random((9, 9)) < 0.7,
        rng.random((*batch, HEADS, 9, 9)) < 0.7,
        rng.random((*some, 1, 1, 9)) < 0.7,
    ):
        mask[..., 0] = True  # Flax gives a row without keys the mean of the values
        got = attention_fn(*x, bias, mask)
        assert got.shape == x[0].shape
        assert_near(got, linen.dot_product_attention(*x, bias, mask), 1e-5)
    lengths = rng.integers(1, 10, batch).astype(np.int32)
    sees = np.arange(9) < lengths[..., None, None, None]
    want = linen.dot_product_attention(*x, mask=sees & np.tri(9, k=3, dtype=bool))
    options = dict(is_causal=True, query_offset=np.full(batch, 3, np.int32))
    by_lengths = make_attention_fn(**options, key_value_seq_lengths=lengths)
    by_mask = make_attention_fn(**options, padding_mask=True)
    assert_near(by_lengths(*x), want, 1e-5)
    assert_near(by_mask(*x, mask=sees.astype(np.float32)), want, 1e-5)


def test_dtype_is_promoted_as_in_flax():
    query, key, value = heads_of((2,))
    query = query.astype("bfloat16")
    assert attention_fn(query, key, value).dtype == jnp.float32
    assert attention_fn(query, key, value, dtype=jnp.float16).dtype == jnp.float16


def decode_linen(attention_fn, x):
    """The model on x, one position at a time through its cache."""
    _, parameters = linen_model(attention_fn)
    model = LinenModel(attention_fn, decode=True)
    cache, rows = jax.jit(model.init)(jax.random.key(0), x)["cache"], []

    @jax.jit
    def step(cache, row):
        out, changed = model.apply(parameters | {"cache": cache}, row, mutable=["cache"])
        return changed["cache"], out

    for i in range(x.shape[1]):
        cache, out = step(cache, x[:, i : i + 1])
        rows.append(out)
    return jnp.concatenate(rows, axis=1)


def decode_nnx(attention_fn, x, **options):
    model = NnxModel(attention_fn, decode=True)
    model.layer.init_cache(x.shape)
    step = nnx.jit(lambda model, row: model(row, **options))
    return jnp.concatenate([step(model, x[:, i : i + 1]) for i in range(x.shape[1])], axis=1)


DECODE = {"linen": decode_linen, "nnx": decode_nnx}


@functools.cache
def whole(flavour, left):
    """What decoding seven positions must give: all at once, with Flax's own attention."""
    apply, parameters = BUILD[flavour](FLAX[flavour])
    return jax.jit(apply)(parameters, inputs(7), mask=band(7, left)[None, None])


@pytest.mark.parametrize("padding_mask", [False, True])
@pytest.mark.parametrize(
    ("options", "left"),
    [({}, 7), (dict(is_causal=True), 7), (dict(is_causal=True, local_window_size=2), 2)],
    ids=["mask", "causal", "window"],
)
@pytest.mark.parametrize("flavour", DECODE)
def test_decode_cache(flavour, options, left, padding_mask):
    """By the mask that Flax makes, dense or as lengths, beside the options of training."""
    attention = make_attention_fn(**options, padding_mask=padding_mask)
    assert_near(DECODE[flavour](attention, inputs(7)), whole(flavour, left), 1e-5)


@pytest.mark.parametrize("flavour", DECODE)
def test_decode_cache_of_flax_itself(flavour):
    """What the test above takes for right is what Flax's attention decodes."""
    assert_near(DECODE[flavour](FLAX[flavour], inputs(7)), whole(flavour, 7), 1e-5)


def test_is_causal_of_a_decode_step():
    """Some versions of Flax pass it on, beside the mask that has said it already."""
    assert_near(decode_nnx(attention_fn, inputs(7), is_causal=True), whole("nnx", 7), 1e-5)


def test_direct_options_reach_the_kernels():
    """Lowered for CUDA: a custom call, with options, with lengths or with a dense mask."""
    x = heads_of((2,), seqlen=16, dtype="bfloat16")
    one_row = [x[0][:, :1], *x[1:]]
    prefix = np.ones((2, 1, 1, 16), np.float32)
    padding = make_attention_fn(is_causal=True, padding_mask=True)

    def kernels(function, x, **options):
        traced = jax.jit(lambda *x: function(*x, **options)).trace(*x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return [text.count(f"@jax_fa3_{name}(") for name in ("forward", "dense_mask")]

    assert kernels(attention_fn, x) == [1, 0]
    assert kernels(make_attention_fn(is_causal=True), x) == [1, 0]
    assert kernels(padding, x, mask=prefix) == [1, 0]
    assert kernels(padding, one_row, mask=prefix) == [1, 0]
    assert kernels(attention_fn, x, mask=prefix) == [1, 1]


@pytest.mark.parametrize(("names", "times"), [(["context"], 1), (["other"], 2)])
def test_remat_keeps_attention_by_its_name(names, times):
    """In the examples' model: what is saved by name is not run again in the backward pass."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    config = Config(20, 3, 32, 4, 2, 16, jnp.bfloat16, remat=policy)
    loss, initialise = build(config, jax_fa3.dot_product_attention)
    tokens = jax.ShapeDtypeStruct((2, 17), "int32")
    traced = jax.jit(jax.grad(loss)).trace(jax.eval_shape(initialise), tokens)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_fa3_forward(") == 3 * times
    assert text.count("@jax_fa3_backward(") == 3


@pytest.mark.parametrize("flavour", FLAX)
def test_every_keyword_of_flax_has_a_place(flavour):
    """linen leaves out, without a word, what an attention function has no parameter for."""
    theirs = inspect.signature(FLAX[flavour]).parameters
    ours = inspect.signature(attention_fn).parameters
    for name, parameter in theirs.items():
        default = None if name == "promote_dtype" else parameter.default
        assert ours[name].default == default, name


def run_linen(call=None, **options):
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, **options)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    jax.eval_shape(lambda: layer.init(rngs, inputs(), **call or {}))


def run_nnx(call=None, **options):
    def run():
        rngs = nnx.Rngs(0)
        layer = nnx.MultiHeadAttention(
            HEADS, WIDTH, attention_fn=attention_fn, decode=False, rngs=rngs, **options
        )
        return layer(inputs(), **call or {})

    jax.eval_shape(run)


def run_itself(**options):
    attention_fn(*heads_of((2,)), **options)


DROPOUT = dict(dropout_rate=0.1, deterministic=False)
EINSUMS = ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls")


@pytest.mark.parametrize(
    ("keyword", "run"),
    [
        ("dropout_rate", lambda: run_linen(**DROPOUT)),
        ("dropout_rate", lambda: run_nnx(**DROPOUT)),
        ("module", lambda: run_linen(call=dict(sow_weights=True))),
        ("module", lambda: run_nnx(call=dict(sow_weights=True))),
        ("precision", lambda: run_linen(precision="highest")),
        ("precision", lambda: run_nnx(precision=jax.lax.Precision.HIGHEST)),
        ("qk_attn_weights_einsum", lambda: run_linen(**dict.fromkeys(EINSUMS, lambda: jnp.einsum))),
        ("attn_weights_value_einsum", lambda: run_itself(attn_weights_value_einsum=jnp.einsum)),
        ("einsum_dot_general", lambda: run_itself(einsum_dot_general=jax.lax.dot_general)),
        ("promote_dtype", lambda: run_itself(promote_dtype=lambda x, **_: x)),
        ("input_positions", lambda: run_itself(input_positions=np.arange(9))),
    ],
)
def test_what_cannot_be_honoured_raises(keyword, run):
    with pytest.raises(NotImplementedError, match=f"^{keyword} is .*expected"):
        run()


def test_what_makes_no_difference_is_accepted():
    run_linen(precision="default", force_fp32_for_softmax=True, broadcast_dropout=False)
    run_nnx(precision=jax.lax.Precision.DEFAULT, broadcast_dropout=False)
    run_linen(dropout_rate=0.1, deterministic=True)
    run_nnx(dropout_rate=0.1, deterministic=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(key=heads_of((3,))[0]), r"key has shape \(3, 9, 4, 8\); expected .*\(2,\)"),
        (dict(value=heads_of(())[0]), r"value has shape \(9, 4, 8\); expected .*\(2,\)"),
        (dict(query=np.ones((9, 8), "float32")), r"query has shape \(9, 8\); expected \(batch"),
        (dict(mask=np.ones((3, 1, 9, 9))), r"mask has shape \(3, 1, 9, 9\); expected .*\(2,\)"),
        (dict(bias=np.ones((2, 2, 1, 9, 9))), r"bias has shape \(2, 2, 1, 9, 9\); expected"),
        (dict(mask=np.ones((2, 1, 9, 9))), r"mask has \(1, 9, 9\).*expected \(1, 1, 9\)"),
        (dict(mask=np.ones((2, 1, 1, 1))), r"mask has \(1, 1, 1\).*expected \(1, 1, 9\)"),
    ],
)
def test_bad_call(change, message):
    call = dict(zip(("query", "key", "value"), heads_of((2,)), strict=True))
    with pytest.raises(ValueError, match=message):
        make_attention_fn(padding_mask=True)(**call | change)


def test_lengths_come_from_one_place():
    with pytest.raises(ValueError, match="key_value_seq_lengths is given .*expected one"):
        make_attention_fn(padding_mask=True, key_value_seq_lengths=LENGTHS)


def test_flax_is_not_imported():
    code = "import sys, jax_fa3.flax; sys.exit('flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_forward_dtype():
    x = [a.astype("bfloat16") for a in heads_of((2,))]
    got = make_attention_fn(forward_dtype="float8_e4m3fn", is_causal=True)(*x)
    want = jax_fa3.dot_product_attention(*x, forward_dtype="float8_e4m3fn", is_causal=True)
    np.testing.assert_array_equal(got, want)


OPTIONS = [
    {},
    dict(padding_mask=True),
    dict(is_causal=True, local_window_size=[8, 0], forward_dtype="float8_e4m3fn"),
    dict(key_value_seq_lengths=np.array([3, 4], "int32"), query_offset=jnp.array([1, 2])),
    dict(query_segment_ids=[[1, 1, 2]], kv_end=jnp.array([[1, 2, 3]]), attention_chunk=2),
    dict(visibility=jax_fa3.make_visibility([1, 1, 2])),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_function_is_a_value(options):
    one, two = (make_attention_fn(**options) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one and hash(copy) == hash(one)
    assert one != make_attention_fn(**options | dict(scale=2.0))


def test_equal_functions_share_a_compilation():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def call(attention, x):
        traced.append(attention)
        return attention(x, x, x)

    x = jnp.ones((1, 4, 2, 8))
    for _ in range(2):
        call(make_attention_fn(is_causal=True), x)
    assert len(traced) == 1


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_documents_and_intervals_of_any_batch(batch):
    """Batch dimensions are folded, of arrays with heads and without."""
    x = heads_of(batch)
    ids = np.broadcast_to(np.repeat([1, 2, 0], [4, 3, 2]), (*batch, 9))
    start = np.broadcast_to(np.maximum(np.arange(9) - 2, 0), (*batch, HEADS, 9))
    function = make_attention_fn(query_segment_ids=ids, kv_start=start)
    row, column = np.arange(9)[:, None], np.arange(9)
    same = (ids[..., None] == ids[..., None, :]) & (ids[..., None] != 0) & (column >= row - 2)
    np.testing.assert_array_equal(function(*x), attention_fn(*x, mask=same[..., None, :, :]))
    if batch:
        with pytest.raises(ValueError, match="kv_start has shape .*expected .*batch"):
            make_attention_fn(kv_start=np.zeros((7, 9), np.int32))(*x)


def test_a_table_for_flax():
    x = heads_of((2, 3))
    table = jax_fa3.make_visibility(np.repeat([1, 2, 0], [4, 3, 2]))
    ids = np.broadcast_to(np.repeat([1, 2, 0], [4, 3, 2]), (2, 3, 9))
    got = make_attention_fn(visibility=table)(*x)
    np.testing.assert_array_equal(got, make_attention_fn(query_segment_ids=ids)(*x))


def test_the_function_itself_is_no_attention_fn():
    """Of nnx; linen passes a function only what its signature has."""
    call = jax_fa3.dot_product_attention
    layer = nnx.MultiHeadAttention(2, 8, attention_fn=call, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="expected.*pass jax_fa3.flax.attention_fn,"):
        layer(np.ones((1, 4, 8), np.float32))
