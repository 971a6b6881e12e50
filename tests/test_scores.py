"""Sinks, largest logits, caps and slopes on their way to the kernels: the custom calls they become,
what runs through XLA and why, what jax.vmap and meshes do with them, and what raises."""

import functools
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dense
import jax_fa3
import jax_fa3.flax
import scores
from case import Case
from contract import Implementation, compare, results_of
from float8 import FLOAT8
from jax_fa3 import dot_product_attention, native, route
from jax_fa3.reference import Reference
from meshes import KINDS, PART, STRATEGIES, in_layout, mesh_of, place, run
from modes import MODES
from oracle import Results
from programs import backward_attributes, custom_calls, forward_attributes, lower, operands

QUERY, KEY = "2x100x4x64xbf16", "2x48x2x64xbf16"
OF_ROWS = "2x4x100xf32"
HEADS, OF_SEQUENCES = "1x4xf32", "2x4xf32"
X = operands(seqlen_q=100)
OF_HEADS = jax.ShapeDtypeStruct((4,), "float32")
ALL = dict(sinks=OF_HEADS, alibi_slopes=OF_HEADS, return_max_logits=True)


def call_reason(x, **options):
    arguments = route.Arguments(*x, **options).with_arrays()
    return route.reasons_of(arguments, arguments.options()).call


def lowered(function, *x, **heads):
    return custom_calls(lower(lambda x, heads: function(*x, **heads), x, heads))


# ---- custom calls


def test_forward():
    """Sinks and slopes stand behind all other operands, the largest logits behind the LSE."""
    attend = functools.partial(dot_product_attention, return_max_logits=True, is_causal=True)
    ((target, attributes, args, results),) = lowered(
        attend, *X, sinks=OF_HEADS, alibi_slopes=OF_HEADS
    )
    assert target == "jax_fa3_forward"
    want = forward_attributes("sinks", "alibi_slopes", max_logits=True)
    assert attributes == want | dict(window_right="0 : i32")
    assert args == [QUERY, KEY, KEY, HEADS, HEADS]
    assert results == [QUERY, OF_ROWS, OF_ROWS, "1xi32"]


def test_backward():
    """Largest logits are a matter of the forward pass, the sinks' gradient one of the backward."""

    def loss(query, key, value, sinks):
        results = dot_product_attention(
            query,
            key,
            value,
            sinks=sinks,
            logits_soft_cap=30.0,
            return_residual=True,
            return_max_logits=True,
        )
        return sum(jnp.sum(x.astype(jnp.float32)) for x in results)

    text = lower(jax.grad(loss, (0, 1, 2, 3)), *X, OF_HEADS)
    forward, (target, attributes, args, results) = custom_calls(text)
    cap = dict(softcap="3.000000e+01 : f32")
    assert forward[1] == forward_attributes("sinks", max_logits=True) | cap
    assert target == "jax_fa3_backward"
    assert attributes == backward_attributes("sinks", dlse=True, gradients=["dsinks"]) | cap
    assert args == [QUERY, KEY, KEY, QUERY, OF_ROWS, QUERY, OF_ROWS, OF_SEQUENCES]
    assert results[:-1] == [QUERY, KEY, KEY, OF_ROWS]


def test_gradients_of_a_bias_and_sinks():
    bias = jax.ShapeDtypeStruct((1, 4, 1, 48), "bfloat16")

    def loss(query, key, value, bias, sinks):
        out = dot_product_attention(query, key, value, bias, sinks=sinks)
        return jnp.sum(out.astype(jnp.float32))

    call = custom_calls(lower(jax.grad(loss, (0, 3, 4)), *X, bias, OF_HEADS))[-1]
    assert call[1] == backward_attributes("bias", "sinks", gradients=["dbias", "dsinks"])
    assert call[2][-2:] == ["1x4x1x48xbf16", OF_SEQUENCES]
    assert call[3][3:5] == ["1x4x1x48xbf16", OF_ROWS]


@pytest.mark.parametrize("mapped", (False, True), ids=("shared", "of each call"))
def test_a_mapped_axis(mapped):
    """Unmapped slopes and sinks stay one row, mapped ones are one for each call; the backward pass
    has sinks of each sequence."""
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in X]
    heads = jax.ShapeDtypeStruct((3, 4) if mapped else (4,), "float32")

    def gradient(query, key, value, sinks, slopes):
        def loss(sinks):
            out = dot_product_attention(query, key, value, sinks=sinks, alibi_slopes=slopes)
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(loss)(sinks)

    axis = 0 if mapped else None
    calls = custom_calls(lower(jax.vmap(gradient, (0, 0, 0, axis, axis)), *stacked, heads, heads))
    (*_, forward, _), (*_, backward, results) = calls
    each = "3x4xf32" if mapped else HEADS
    assert forward[-2:] == [each, each]
    assert backward[-2:] == ["6x4xf32", each]
    assert results[3] == "6x4x100xf32"


def test_plans_know_the_score(monkeypatch):
    asked = []

    class Recording:
        def plan(self, family, *, variant, **_):
            asked.append((family, variant))
            return dict(workspace_bytes=0)

    monkeypatch.setattr(native, "_C", Recording())
    native._plan.cache_clear()
    options = route.Arguments(*X, logits_soft_cap=3.0).options()
    plain = route.Arguments(*X).options()
    n = route.Arguments(*X).extents
    native.plan("forward", "bfloat16", n, options)
    native.plan("backward", "bfloat16", n, options)
    native.plan("backward", "bfloat16", n, plain, arrays=["alibi_slopes", "sinks"])
    native.plan("forward", "bfloat16", n, plain, arrays=["sinks", "bias"])
    native._plan.cache_clear()
    assert asked == [
        ("forward", "softcap"),
        ("backward", "softcap"),
        ("backward", "alibi"),
        ("forward", "bias"),
    ]


# ---- routes


def test_reasons():
    bias, mask = jax.ShapeDtypeStruct((48,), "bfloat16"), jax.ShapeDtypeStruct((48,), "bool")
    cap, slopes = dict(logits_soft_cap=5.0), dict(alibi_slopes=OF_HEADS)
    for options in (cap, slopes, dict(sinks=OF_HEADS, return_max_logits=True)):
        assert call_reason(X, **options) is None
    with_bias = dict(sinks=OF_HEADS, return_max_logits=True, bias=bias, mask=mask)
    assert call_reason(X, **with_bias) is None
    assert "take bias and logits_soft_cap one at" in call_reason(X, bias=bias, mask=mask, **cap)
    assert "take mask and alibi_slopes one at" in call_reason(X, mask=mask, **slopes)
    assert "logits_soft_cap and alibi_slopes one at" in call_reason(X, **cap, **slopes)
    for value in (1e-4, 1e7):
        assert "logits_soft_cap from 0.000976562 to" in call_reason(X, logits_soft_cap=value)
    float8 = [jax.ShapeDtypeStruct(x.shape, FLOAT8) for x in X]
    for name, value in (ALL | cap).items():
        assert call_reason(float8, **{name: value}) == (
            f"the kernels take no {name} with float8_e4m3fn inputs"
        )


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "return_max_logits", "logits_soft_cap"])
def test_forward_dtype_is_left_out(name, caplog):
    given = {name: (ALL | dict(logits_soft_cap=5.0))[name]}
    reason = jax_fa3.is_supported(*X, **given, forward_dtype=FLOAT8)
    assert reason == f"the float8 kernels take no {name}"
    arrays = {n: x for n, x in given.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = given.keys() - arrays.keys()
    attend = functools.partial(
        dot_product_attention, forward_dtype=FLOAT8, **{n: given[n] for n in static}
    )
    route.log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, "jax_fa3"):
        assert [call[0] for call in lowered(attend, *X, **arrays)] == ["jax_fa3_forward"]
    said = [record.getMessage() for record in caplog.records if record.name == "jax_fa3"]
    assert said == [
        f"dot_product_attention runs its forward pass in the dtype of its inputs: {reason}"
    ]


def test_what_the_kernels_do_not_take_runs_through_xla():
    attend = functools.partial(dot_product_attention, logits_soft_cap=5.0)
    assert lowered(attend, *X, alibi_slopes=OF_HEADS) == []


def test_the_doctor_and_is_supported_know_them(capsys, monkeypatch):
    monkeypatch.setattr(route, "device_reason", lambda: None)
    assert jax_fa3.is_supported(*X, sinks=OF_HEADS, return_max_logits=True) is None
    jax_fa3.doctor(*X, sinks=OF_HEADS, logits_soft_cap=5.0)
    said = capsys.readouterr().out
    assert (
        "sinks float32[4], logits_soft_cap=5.0" in said and "would run the Hopper kernels" in said
    )
    jax_fa3.doctor(*X, alibi_slopes=OF_HEADS, logits_soft_cap=5.0)
    assert "logits_soft_cap and alibi_slopes one at a time" in capsys.readouterr().out


# ---- meaning


XLA = Implementation("xla")
CASES = [scores.random_case(n) for n in range(scores.NUMBERS)]
SMALL = [case for case in CASES if max(case.seqlen_q, case.seqlen_k) <= 200]


def test_random_problems_are_of_all_kinds():
    assert len({case.name for case in CASES}) == len(CASES)
    for what in ("softcap", "alibi", "sinks", "max_logits"):
        have = [case for case in CASES if getattr(case, what)]
        assert len(have) >= 300
        for other in ("window", "query_lengths", "key_lengths", "documents", "intervals", "chunk"):
            assert sum(getattr(case, other) is not None for case in have) >= 20, (what, other)
        assert sum(case.heads_q > case.heads_kv for case in have) >= 100
        assert sum(case.fold is not None for case in have) >= 50
    for case in CASES:
        dense_arrays = case.bias is not None or case.mask is not None
        assert dense_arrays + bool(case.softcap) + bool(case.alibi) <= 1
    own = [case for case in CASES if case.own_heads > 1]
    assert (
        sum(bool(case.sinks) for case in own) >= 20 and sum(bool(case.alibi) for case in own) >= 20
    )
    assert sum(case.bias is not None for case in CASES if case.sinks) >= 100


@pytest.mark.parametrize("case", SMALL[:: len(SMALL) // 6], ids=lambda case: case.name)
def test_random_problems(case):
    dense.check(XLA, case)


def everything(seed=0, dtype="float32"):
    """A bias, a mask, slopes, sinks and a cap at once, which only XLA takes."""
    rng = np.random.default_rng(seed)
    query, key, value = (
        rng.standard_normal((2, n, h, 16), np.float32).astype(dtype)
        for n, h in ((20, 4), (24, 2), (24, 2))
    )
    arrays = dict(
        bias=rng.standard_normal((1, 4, 20, 24), np.float32),
        mask=rng.random((2, 1, 20, 24)) < 0.8,
        alibi_slopes=rng.standard_normal(4).astype("float32"),
        sinks=rng.standard_normal(4).astype("float32"),
    )
    options = dict(logits_soft_cap=1.5, is_causal=True, query_offset=3, local_window_size=(9, 2))
    return (query, key, value), arrays, options


def test_everything_at_once():
    """Scale, bias, slopes, cap, mask, largest logit, sink: in this order."""
    x, arrays, options = everything()
    rng = np.random.default_rng(1)
    cotangents = rng.standard_normal((2, 20, 4, 16)), rng.standard_normal((2, 20, 4))
    cotangents = tuple(y.astype("float32") for y in cotangents)

    def results(x, bias, sinks, others):
        def attend(x, bias, sinks):
            out, lse, max_logits = dot_product_attention(
                *x,
                bias=bias,
                sinks=sinks,
                **others,
                **options,
                return_residual=True,
                return_max_logits=True,
                implementation="xla",
            )
            return (out, lse), max_logits

        primals, vjp, max_logits = jax.vjp(attend, x, bias, sinks, has_aux=True)
        return primals, max_logits, vjp(cotangents)

    others = {name: arrays[name] for name in ("mask", "alibi_slopes")}
    primals, max_logits, gradients = run(results, x, arrays["bias"], arrays["sinks"], others)
    want = Reference(*x, **arrays, **options)
    got = jax.tree.leaves((primals, max_logits, gradients))
    expected = [want.out, want.lse, want.max_logits, *want.gradients(*cotangents)]
    for g, w in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5)


def test_a_sink_of_minus_infinity_is_none():
    """Its gradient is 0, also where its row sees no key."""
    x, *_ = everything()
    lengths = np.array([24, 0], np.int32)

    def results(sinks):
        given = dict(return_residual=True, key_value_seq_lengths=lengths, implementation="xla")
        return dot_product_attention(*x, sinks=sinks, **given)

    def both(sinks):
        got, vjp = jax.vjp(results, sinks)
        return results(None), got, vjp(got)[0]

    want, got, gradient = run(both, np.full(4, -np.inf, np.float32))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_floats_are_cast(dtype):
    x, arrays, _ = everything()
    given = [arrays[name].astype(dtype) for name in ("sinks", "alibi_slopes")]

    def results(sinks, slopes):
        def loss(sinks):
            out = dot_product_attention(*x, sinks=sinks, alibi_slopes=slopes)
            return jnp.sum(jnp.sin(out))

        return jax.value_and_grad(loss)(sinks)

    got, want = (run(results, *heads) for heads in (given, [y.astype("float32") for y in given]))
    assert got[0] == want[0] and np.array_equal(got[1], want[1].astype(got[1].dtype))
    assert got[1].dtype == ("float32" if dtype == "float64" else dtype)


def test_three_dimensions():
    x, arrays, options = everything()
    heads = {name: arrays[name] for name in ("sinks", "alibi_slopes")}
    options = options | heads | dict(return_residual=True, return_max_logits=True)
    attend = functools.partial(dot_product_attention, **options)
    want, got = run(lambda *x: (attend(*x), attend(*(y[0] for y in x))), *x)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w[0], rtol=1e-5, atol=1e-6)
    assert [g.shape for g in got] == [(20, 4, 16), (20, 4), (4,)]


@pytest.mark.parametrize("largest", (False, True))
@pytest.mark.parametrize("residual", (False, True))
def test_results_come_in_order(residual, largest):
    x, *_ = everything()
    flags = dict(return_residual=residual, return_max_logits=largest)
    got = jax.eval_shape(functools.partial(dot_product_attention, **flags), *x)
    shapes = [y.shape for y in (got if isinstance(got, tuple) else (got,))]
    assert shapes == [(2, 20, 4, 16)] + [(2, 20, 4)] * residual + [(2, 4)] * largest
    assert isinstance(got, tuple) == (residual or largest)


def test_the_largest_logits_have_no_gradient():
    x, *_ = everything(dtype="bfloat16")

    def loss(query, weight):
        out, largest = dot_product_attention(query, *x[1:], return_max_logits=True)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + weight * jnp.sum(largest)

    both = run(lambda x: [jax.grad(loss)(x, weight) for weight in (0.0, 5.0)], x[0])
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_slopes_have_no_gradient(implementation):
    x, arrays, _ = everything(dtype="bfloat16")

    def loss(slopes):
        attend = jax.checkpoint(
            lambda s: dot_product_attention(*x, alibi_slopes=s, implementation=implementation)
        )
        return jnp.sum(attend(slopes).astype(jnp.float32))

    slopes = jnp.asarray(arrays["alibi_slopes"])
    with pytest.raises(NotImplementedError, match="alibi_slopes have no gradient; pass jax.lax.st"):
        jax.eval_shape(jax.grad(jax.jit(loss)), slopes)
    jax.eval_shape(jax.grad(lambda s: loss(jax.lax.stop_gradient(s))), slopes)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap(axes):
    """Sinks and slopes of each call, or of all, and the sinks' gradient of each."""
    x, arrays, _ = everything(dtype="bfloat16")
    stacked = [np.stack([y, y[::-1]]) for y in x]
    heads = [arrays["sinks"], arrays["alibi_slopes"]]
    heads = [y if a is None else np.stack([y, y[::-1]]) for y, a in zip(heads, axes, strict=True)]

    def results(query, key, value, sinks, slopes):
        def attend(query, sinks):
            options = dict(is_causal=True, return_residual=True, return_max_logits=True)
            out, lse, largest = dot_product_attention(
                query, key, value, sinks=sinks, alibi_slopes=slopes, **options
            )
            return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(lse)), largest

        return jax.grad(attend, (0, 1), has_aux=True)(query, sinks)

    got = run(jax.vmap(results, (0, 0, 0, *axes)), *stacked, *heads)
    for i in range(2):
        own = [y if a is None else y[i] for y, a in zip(heads, axes, strict=True)]
        want = run(results, *(y[i] for y in stacked), *own)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(
                g[i].astype("float32"), w.astype("float32"), rtol=1e-2, atol=1e-2
            )


def test_scan_remat_and_export():
    """Two layers of which each has its own sinks; exported, the program gives the same."""
    (query, key, value), arrays, _ = everything(dtype="bfloat16")

    def loss(query, sinks, slopes):
        def layer(carry, sinks):
            query, largest = carry
            options = dict(sinks=sinks, alibi_slopes=slopes, return_max_logits=True)
            out, own = dot_product_attention(query, key, value, **options)
            return (out, jnp.maximum(largest, own)), None

        init = query, jnp.full((2, 4), -jnp.inf)
        (out, largest), _ = jax.lax.scan(jax.checkpoint(layer), init, sinks)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), largest

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    x = (query, np.stack([arrays["sinks"], arrays["sinks"][::-1]]), arrays["alibi_slopes"])
    got = gradient(*x)
    assert np.all(np.isfinite(got[1])) and np.any(got[0][1][0]) and np.any(got[0][1][1])
    exported = jax.export.export(gradient)(*x)
    again = jax.export.deserialize(exported.serialize()).call(*x)
    for g, w in zip(jax.tree.leaves(again), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(g, w)


# ---- several devices

ON_MESH = Case(
    batch=4,
    seqlen_q=32,
    seqlen_k=32,
    heads_q=4,
    heads_kv=2,
    head_dim=16,
    causal=True,
    query_lengths=(32, 20, 32, 7),
    key_lengths=(32, 0, 9, 32),
    sinks="small",
    max_logits=True,
)
SLOPES = dict(alibi="any")
WINDOW = dict(alibi="any", window=(6, 0), offset=3)
CAPPED = dict(alibi="any", softcap=2.0, causal=False)
ALONE = dict(query_lengths=None)  # nothing but causal and the keys' lengths
UNMASKED = dict(softcap=2.0, causal=False)
GROUPS = dict(alibi="any", heads_q=8, heads_kv=4)


def case_of(options):
    return Case(**{f: getattr(ON_MESH, f) for f in ON_MESH.__dataclass_fields__} | options)


def vector_jacobian(case, attend=dot_product_attention, **options):
    """The Results as a function of a case's inputs, index arrays, slopes and sinks."""

    def results(query, key, value, dout, dlse, index, heads):
        def call(query, key, value, sinks):
            given = case.options | options | index | heads | sinks
            out, lse, largest = attend(query, key, value, return_residual=True, **given)
            return (out, lse), [largest]

        sinks = {"sinks": heads["sinks"]}
        return results_of(call, dout, dlse, query, key, value, sinks)

    return results


def check(case, got):
    got = {name: np.asarray(x) for name, x in got.items()}
    compare(case, case.inputs(), Results(**got))


@pytest.mark.parametrize("mode", MODES)
def test_mesh(mode):
    """Batch and heads split; slopes and sinks with the heads."""
    case = case_of(SLOPES)
    kinds, manual = MODES[mode]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4])
    array, heads, index = P("data", None, "model"), P("model"), P("data")
    specs = ((array,) * 5, dict.fromkeys(case.index_arrays, index))
    specs = (*specs[0], specs[1], dict.fromkeys(case.head_arrays, heads))
    results = dict.fromkeys(("out", "lse", "dquery", "dkey", "dvalue"), array)
    results |= dict(dsinks=P(None, "model"), max_logits=P("data", "model"))
    function = vector_jacobian(case)
    if manual:

        def of_manual(specs):
            def named(spec):
                return P(*(name if name in manual else None for name in spec))

            return jax.tree.map(named, specs, is_leaf=lambda x: isinstance(x, P))

        function = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=of_manual(specs),
            out_specs=of_manual(results),
            axis_names=manual,
        )
    x = (*case.inputs(), case.index_arrays, case.head_arrays)
    leaves, tree = jax.tree.flatten(x)
    places = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    with jax.set_mesh(mesh):
        check(case, run(function, *tree.unflatten(place(mesh, leaves, places))))


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("automatic", "allgather"),
        ("explicit", "ring"),
        ("explicit", "ulysses"),
    ],
)
def test_split_sequence(kind, strategy):
    """Rows that arrive split: by the partitioner, or jax.shard_map over explicit axes."""
    case = case_of(SLOPES)
    mesh = mesh_of(KINDS[kind], seq=2)
    function = vector_jacobian(case, sequence_parallel=strategy)
    x = (*case.inputs(), case.index_arrays, case.head_arrays)
    leaves, tree = jax.tree.flatten(x)
    with jax.set_mesh(mesh):
        places = [PART] * 5 + [P()] * (len(leaves) - 5)
        check(case, run(function, *tree.unflatten(place(mesh, leaves, places))))


@pytest.mark.parametrize(
    ("strategy", "layout", "size", "options"),
    [
        ("ring", "contiguous", 2, {}),
        ("ring", "contiguous", 4, WINDOW),
        ("ring", "zigzag", 2, CAPPED),
        ("ring", "zigzag", 4, ALONE),
        ("ring", "contiguous", 2, UNMASKED),
        ("allgather", "contiguous", 2, SLOPES),
        ("allgather", "zigzag", 2, CAPPED),
        ("allgather", "contiguous", 4, ALONE),
        ("allgather", "zigzag", 2, ALONE),
        ("allgather", "contiguous", 2, UNMASKED),
        ("ulysses", "zigzag", 2, WINDOW),
        ("ulysses", "contiguous", 2, GROUPS),
    ],
)
def test_divided_sequence(strategy, layout, size, options):
    """The sink once a row, distances of parts of the sequence, the maximum over all of them."""
    case = case_of(options)
    whole = ("dsinks", "max_logits")
    names = ("out", "lse", "dquery", "dkey", "dvalue", *whole)
    function = jax.shard_map(
        vector_jacobian(case, STRATEGIES[strategy], axis_name="seq", layout=layout),
        mesh=mesh_of(seq=size),
        in_specs=(*(PART,) * 5, P(), P()),
        out_specs={name: P() if name in whole else PART for name in names},
    )
    x = [in_layout(layout, size, y) for y in case.inputs()]
    got = run(function, *x, case.index_arrays, case.head_arrays)
    laid = {
        name: y if name in whole else in_layout(layout, size, np.asarray(y), inverse=True)
        for name, y in got.items()
    }
    check(case, laid)


def test_a_ring_has_the_sink_in_one_step():
    """And slopes make every step one of positions."""
    case = case_of({})

    def calls(**heads):
        function = jax.shard_map(
            lambda *x: jax_fa3.ring_attention(*x[:3], axis_name="seq", is_causal=True, **x[3]),
            mesh=mesh_of(seq=4),
            in_specs=(PART, PART, PART, P()),
            out_specs=PART,
        )
        return custom_calls(lower(function, *case.inputs()[:3], heads))

    sinks = calls(sinks=case.head_arrays["sinks"])
    assert len(sinks) == 4 and sum("sinks" in call[1]["operands"] for call in sinks) == 1
    slopes = calls(alibi_slopes=case.head_arrays["sinks"])
    assert all("alibi_slopes" in call[1]["operands"] for call in slopes)
    assert any("query_offset" in call[1]["operands"] for call in slopes)


# ---- other entries


def test_documents_one_after_another():
    """Distances are those in each document, and the largest logit is that of all."""
    rng = np.random.default_rng(2)
    query, key, value = (rng.standard_normal((30, h, 16), np.float32) for h in (4, 2, 2))
    slopes, sinks = rng.random(4, np.float32), rng.standard_normal(4).astype("float32")
    ends = np.array([0, 9, 25, 30], np.int32)
    given = dict(alibi_slopes=slopes, sinks=sinks, return_residual=True, return_max_logits=True)
    attend = functools.partial(jax_fa3.flash_attention_varlen, cu_seqlens_q=ends, causal=True)
    x = query, key, value

    def by_document(*x):
        return [
            dot_product_attention(
                *(y[i:j] for y in x), is_causal=True, logits_soft_cap=1.5, **given
            )
            for i, j in zip(ends[:-1], ends[1:], strict=True)
        ]

    outs, lses, largest = zip(*run(by_document, *x), strict=True)
    want = np.concatenate(outs), np.concatenate(lses), np.max(largest, 0)
    got = run(functools.partial(attend, softcap=1.5, **given), *x)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
    off, plain = (lower(functools.partial(attend, **y), *x) for y in (dict(softcap=0.0), {}))
    assert off == plain


def test_the_programs_of_the_page():
    page = (pathlib.Path(__file__).parents[1] / "docs/scores.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})


def test_flax():
    x, arrays, _ = everything()
    heads = {name: arrays[name] for name in ("sinks", "alibi_slopes")}
    attend = jax_fa3.flax.make_attention_fn(**heads, logits_soft_cap=3.0)
    plain = functools.partial(dot_product_attention, **heads, logits_soft_cap=3.0)
    np.testing.assert_array_equal(*run(lambda *x: (attend(*x), plain(*x)), *x))
    again = jax_fa3.flax.make_attention_fn(**heads, logits_soft_cap=3.0)
    other = jax_fa3.flax.make_attention_fn(**heads | dict(sinks=arrays["sinks"] + 1))
    assert attend == again and attend != other


# ---- errors

BAD = [
    (dict(logits_soft_cap=0.0), ValueError, "logits_soft_cap is 0.0; expected a positive, finite"),
    (dict(logits_soft_cap=-3), ValueError, "logits_soft_cap is -3.0; expected a positive"),
    (dict(logits_soft_cap=np.inf), ValueError, "logits_soft_cap is inf; expected"),
    (dict(logits_soft_cap=np.nan), ValueError, "logits_soft_cap is nan; expected"),
    (dict(logits_soft_cap=1e-60), ValueError, "logits_soft_cap is 1e-60; expected"),
    (dict(logits_soft_cap=True), TypeError, "logits_soft_cap is True; expected a positive"),
    (dict(logits_soft_cap="5"), TypeError, "logits_soft_cap is '5'; expected a positive"),
    (dict(logits_soft_cap=np.ones(1)), TypeError, "logits_soft_cap is .*; expected a positive"),
    (dict(return_max_logits=1), TypeError, "return_max_logits is 1; expected a Python bool"),
    (dict(sinks=np.zeros(2)), ValueError, r"sinks has shape \(2,\); expected \(4,\), one for each"),
    (dict(sinks=np.zeros((1, 4))), ValueError, r"sinks has shape \(1, 4\); expected \(4,\)"),
    (dict(sinks=np.zeros(4, np.int32)), TypeError, "sinks has dtype int32; expected float32"),
    (dict(sinks=3.0), ValueError, r"sinks has shape \(\); expected \(4,\)"),
    (dict(sinks=["x"] * 4), TypeError, "sinks is a list; expected an array"),
    (dict(alibi_slopes=[1, 2, 3, 4]), TypeError, "alibi_slopes has dtype int64; expected float32"),
    (dict(alibi_slopes=np.zeros(3)), ValueError, r"alibi_slopes has shape \(3,\); expected \(4,\)"),
    (dict(alibi_slopes=np.zeros(4, bool)), TypeError, "has dtype bool; expected float32"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "words"), BAD, ids=lambda x: str(x)[:40])
def test_bad_arguments(given, error, words):
    x, *_ = everything()
    for function in (dot_product_attention, jax_fa3.is_supported):
        with pytest.raises(error, match=words):
            function(*x, **given)


def test_a_traced_cap():
    x, *_ = everything()
    with pytest.raises(TypeError, match="logits_soft_cap is an array; expected a positive"):
        jax.jit(lambda cap: dot_product_attention(*x, logits_soft_cap=cap))(3.0)


def test_bad_arguments_of_documents():
    x = [np.ones((6, 4, 16), np.float32)] * 3
    ends = np.array([0, 4, 6], np.int32)
    attend = jax_fa3.flash_attention_varlen
    with pytest.raises(ValueError, match="softcap is -1.0; expected a positive"):
        attend(*x, ends, softcap=-1.0)
    with pytest.raises(
        ValueError, match="alibi_slopes and cu_seqlens_k are given; expected one of"
    ):
        attend(*x, ends, ends.copy(), alibi_slopes=np.ones(4, np.float32))
