"""Tables of visibility, and calls that have one."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import contract
import float8
import jax_fa3
import packed
import visibility
from cases import PACKED
from jax_fa3 import dot_product_attention
from jax_fa3.arguments import Arguments
from jax_fa3.context_parallel import public
from jax_fa3.visibility.layout import Layout
from meshes import PART, STRATEGIES, both_kinds, mesh_of, place, run
from transforms import assert_near, score


def normal(rng, batch, seqlen, heads, dtype="float32"):
    return rng.standard_normal((batch, seqlen, heads, 64), np.float32).astype(dtype)


# ---- the table


@pytest.mark.parametrize("kind", visibility.KINDS)
def test_table_is_the_models(kind):
    """Hundreds of random problems; traced, so that ids may break their rule."""
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    for _ in range(5):
        seqlen_q, seqlen_k, sources = visibility.random_problem(rng, kind)
        want = visibility.model(seqlen_q, seqlen_k, **sources)
        arrays = {name: x for name, x in sources.items() if isinstance(x, np.ndarray)}
        static = {name: x for name, x in sources.items() if name not in arrays}

        def make(arrays, static=static, seqlens=(seqlen_q, seqlen_k)):
            return jax_fa3.make_visibility(
                **arrays, **static, seqlen_q=seqlens[0], seqlen_k=seqlens[1]
            )

        made = run(make, arrays)
        np.testing.assert_array_equal(made.table, want)
        assert want.shape[-1] == Layout.of(seqlen_q, seqlen_k).words


def test_the_models_problems_are_of_every_kind():
    """Planes that are monotone, valid, neither or both, with and without rows that see nothing."""
    rng, flags = np.random.default_rng(0), set()
    for kind in visibility.KINDS:
        for _ in range(20):
            seqlen_q, seqlen_k, sources = visibility.random_problem(rng, kind, most=80)
            table = visibility.model(seqlen_q, seqlen_k, **sources)
            flags |= set(table[..., 0].ravel().tolist())
    assert flags == {1, 2, 3}


# ---- what a call with one means


XLA = contract.Implementation("xla")
DEFAULT = contract.Implementation(None)  # the way of the kernels, with XLA at its end on the CPU


@pytest.mark.parametrize("case", PACKED[::4], ids=lambda case: case.name)
def test_made_once(case):
    packed.check_made_once(XLA, case)


@pytest.mark.parametrize("case", PACKED[::9], ids=lambda case: case.name)
def test_results_of_the_default(case):
    contract.check_padding(DEFAULT, dataclasses.replace(case, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("case", "lengths", "of_keys"), packed.VARLEN, ids=lambda x: getattr(x, "name", None)
)
def test_varlen(case, lengths, of_keys):
    packed.check_varlen(XLA, case, lengths, of_keys)


def test_documents_change_places():
    packed.check_permutation(XLA, packed.PERMUTED_CASE, (3, 1, 4, 0, 2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", [XLA, DEFAULT], ids=["xla", "default"])
def test_ids_that_come_back_give_nan(implementation, causal):
    case = dataclasses.replace(packed.ILLEGAL_CASE, causal=causal)
    packed.check_illegal(implementation, case, packed.illegal_ids())


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("heads", [1, 2, 4], ids=["one", "key heads", "query heads"])
def test_one_table_for_any_batch(heads, implementation):
    """Of batch 1, and of one head, the key heads or the query heads."""
    rng = np.random.default_rng(0)
    query, key, value = normal(rng, 3, 40, 4), normal(rng, 3, 50, 2), normal(rng, 3, 50, 2)
    start = rng.integers(0, 40, (1, heads, 40)).astype(np.int32)
    table = jax_fa3.make_visibility(kv_start=start, kv_end=start + 9, seqlen_k=50)
    assert table.table.shape[:2] == (1, heads)
    by_head = np.repeat(start, 4 // heads, 1)[..., None]
    column = np.arange(50)
    mask = (by_head <= column) & (column < by_head + 9)
    attend = functools.partial(
        dot_product_attention, query, key, value, implementation=implementation
    )
    np.testing.assert_array_equal(attend(visibility=table), attend(mask=mask))


def test_shared_by_layers_with_different_windows():
    """A window is the call's, a document the table's."""
    rng = np.random.default_rng(1)
    x = normal(rng, 2, 40, 2)
    ids = np.repeat([[1, 2], [5, 3]], 20, axis=1).astype(np.int32)
    table = jax_fa3.make_visibility(ids)
    for more in (dict(is_causal=True), dict(local_window_size=(3, 2)), dict(query_offset=4)):
        got = dot_product_attention(x, x, x, visibility=table, **more)
        want = dot_product_attention(x, x, x, query_segment_ids=ids, **more)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("batched", [False, True])
def test_inputs_without_a_batch(batched):
    rng = np.random.default_rng(2)
    query, key, value = (x[0] for x in (normal(rng, 1, 40, 4), *[normal(rng, 1, 40, 2)] * 2))
    ids = np.repeat([3, 1, 0], [10, 25, 5]).astype(np.int32)
    start = np.maximum(np.arange(40) - np.array([[3], [9]]), 0).astype(np.int32)  # of key heads
    end = np.full((40,), 33, np.int32)
    told = dict(query_segment_ids=ids, kv_start=start, kv_end=end)
    if batched:
        told = {name: x[None] for name, x in told.items()}
    got = dot_product_attention(query, key, value, is_causal=True, **told)
    row, column = np.arange(40)[:, None], np.arange(40)
    mask = (ids[:, None] == ids) & (ids > 0) & (column < 33) & (column <= row)
    mask = mask & (np.repeat(start, 2, 0)[..., None] <= column)
    want = dot_product_attention(query, key, value, mask=mask)
    np.testing.assert_array_equal(got, want)


def test_values_outside_the_keys_mean_the_nearest():
    rng = np.random.default_rng(3)
    x = normal(rng, 2, 20, 2)
    lowest, highest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    start = np.where(np.arange(20) % 2, lowest, 3).astype(np.int32)
    end = np.where(np.arange(20) % 3, highest, 17).astype(np.int32)
    got = dot_product_attention(x, x, x, kv_start=start[None].repeat(2, 0), kv_end=[end, end])
    want = dot_product_attention(
        x, x, x, kv_start=[start.clip(0, 20)] * 2, kv_end=[end.clip(0, 20)] * 2
    )
    np.testing.assert_array_equal(got, want)


def test_with_a_bias_and_a_mask():
    """They mean the same."""
    rng = np.random.default_rng(4)
    x = normal(rng, 2, 30, 2)
    bias = rng.standard_normal((2, 2, 30, 30), np.float32)
    mask = rng.random((2, 1, 30, 30)) < 0.8
    ids = np.repeat([[1, 2, 0], [7, 3, 4]], 10, axis=1).astype(np.int32)
    same = (ids[:, None, :, None] == ids[:, None, None]) & (ids[:, None, :, None] != 0)
    got = dot_product_attention(x, x, x, bias, mask, query_segment_ids=ids)
    want = dot_product_attention(x, x, x, bias, mask & same)
    np.testing.assert_array_equal(got, want)
    reason = jax_fa3.is_supported(*[x.astype("bfloat16")] * 3, bias, query_segment_ids=ids)
    assert reason.startswith("the kernels take a bias of query's dtype, bfloat16, not float32")


@pytest.mark.parametrize("case", [PACKED[1], PACKED[6], PACKED[-5]], ids=lambda case: case.name)
def test_float8(case):
    """forward_dtype rounds what is no padding; float8 inputs are as they are."""
    case = dataclasses.replace(case, dtype="bfloat16", head_dim=64, head_dim_v=None)
    *arrays, dout, dlse = contract.spoil_padding(case, case.inputs())
    lengths = dict(
        query_seq_lengths=case.query_used.sum(1).astype(np.int32),
        key_value_seq_lengths=case.key_used.sum(1).astype(np.int32),
    )
    x = jax_fa3.quantize_qkv(*arrays, **lengths)
    call = functools.partial(
        dot_product_attention, return_residual=True, **case.options, **case.index_arrays
    )
    float8.check(case, call(*arrays, forward_dtype=float8.FLOAT8), float8.dequantised(x))
    float8.check(case, call(**x._asdict()), float8.dequantised(x))
    _, vjp = jax.vjp(functools.partial(call, forward_dtype=float8.FLOAT8), *arrays)
    got = vjp((jnp.asarray(dout), jnp.asarray(dlse)))
    want = case.reference(case.inputs())
    for x, y in zip(got, (want.dquery, want.dkey, want.dvalue), strict=True):
        assert_near(x, y, relative=0.15)  # of float8 and of its gradients, straight-through


# ---- transformations


IDS = np.repeat([[4, 1, 0], [2, 7, 3]], [9, 6, 5], axis=1).astype(np.int32)


def told_operands(count=None):
    """query, key, value, ids and key heads' first keys; or `count` of each, all different."""
    rng = np.random.default_rng(5)
    x = [normal(rng, 2 * (count or 1), 20, heads, "bfloat16") for heads in (4, 2, 2)]
    start = rng.integers(0, 12, (2 * (count or 1), 2, 20)).astype(np.int32)
    ids = np.concatenate([np.roll(IDS, i, 1) % (9 - i) for i in range(count or 1)])
    ids = np.where(_are_runs(ids)[:, None], ids, 1).astype(np.int32)
    x = [*x, ids, start]
    return x if count is None else [a.reshape(count, 2, *a.shape[1:]) for a in x]


def _are_runs(ids):
    table = visibility.model(ids.shape[1], ids.shape[1], query_segment_ids=ids)
    return table[:, 0, 0] & 1 == 1


def attend(query, key, value, ids, start, **options):
    out, lse = dot_product_attention(
        query,
        key,
        value,
        query_segment_ids=ids,
        kv_start=start,
        is_causal=True,
        return_residual=True,
        **options,
    )
    return out, jnp.where(jnp.isneginf(lse), -1.0, lse)


def gradient(*x, **options):
    return jax.grad(lambda *y: score(*attend(*y, *x[3:], **options)), (0, 1, 2))(*x[:3])


@pytest.mark.parametrize(
    "axes",
    [(0,) * 5, (0, 0, 0, None, None), (None, None, None, 0, None), (0, None, 1, None, 2)],
    ids=str,
)
@pytest.mark.parametrize("function", [attend, gradient])
def test_vmap(function, axes):
    one, three = told_operands(), told_operands(3)
    x = [
        a if axis is None else np.moveaxis(b, 0, axis)
        for a, b, axis in zip(one, three, axes, strict=True)
    ]
    got = run(jax.vmap(function, in_axes=axes), *x)
    for i in range(3):
        alone = [a if axis is None else b[i] for a, b, axis in zip(one, three, axes, strict=True)]
        assert_near([g[i] for g in got], run(function, *alone))


def test_vmap_of_tables():
    """A table that is made under vmap, and one that is mapped over."""
    query, key, value, ids, _ = told_operands(3)

    def attend(query, key, value, table):
        return dot_product_attention(query, key, value, visibility=table)

    def direct(query, key, value, ids):
        return dot_product_attention(query, key, value, query_segment_ids=ids)

    tables = jax.vmap(jax_fa3.make_visibility)(ids)
    assert tables.table.shape[:3] == (3, 2, 1)
    got = jax.jit(jax.vmap(attend))(query, key, value, tables)
    assert_near(got, jax.jit(jax.vmap(direct))(query, key, value, ids))
    shared = jax.tree.map(lambda x: x[0], tables)
    got = jax.jit(jax.vmap(attend, in_axes=(0, 0, 0, None)))(query, key, value, shared)
    assert_near(got[1], direct(query[1], key[1], value[1], ids[0]))


@pytest.mark.parametrize("heads", [None, 2, 4])
def test_vmap_of_one_table_over_calls_without_a_batch(heads):
    """A table of a batch, each of whose planes goes to a call of 3-D inputs; and gradients."""
    query, key, value, ids, start = told_operands()
    start = np.repeat(start, 2, 1) if heads == 4 else start
    told = dict(query_segment_ids=ids) | ({} if heads is None else dict(kv_start=start))
    table = jax.jit(jax_fa3.make_visibility)(**told)
    assert table.table.shape[:2] == (2, heads or 1)

    def results(attend, query, key, value):
        out, vjp = jax.vjp(attend, query, key, value)
        return out, *vjp(out)

    def with_table(*x):
        attend = functools.partial(dot_product_attention, is_causal=True)
        return jax.vmap(lambda table, *x: attend(*x, visibility=table))(table, *x)

    def direct(*x):
        return dot_product_attention(*x, is_causal=True, **told)

    x = query, key, value
    want = run(functools.partial(results, direct), *x)
    assert_near(run(functools.partial(results, with_table), *x), want)
    twice = jax.vmap(with_table, in_axes=1, out_axes=1)
    got = run(twice, *(np.stack([a, a], 1) for a in x))
    assert_near(got[:, 1], want[0])


def test_vmap_of_tables_of_documents():
    rng = np.random.default_rng(8)
    x = [normal(rng, 2, 60, heads) for heads in (4, 2, 2)]
    ends = np.array([[0, 20, 60], [0, 35, 50]], np.int32)
    table = jax_fa3.make_visibility(cu_seqlens_q=ends, seqlen_q=60)
    attend = functools.partial(jax_fa3.flash_attention_varlen, causal=True)

    def call(table, *x):
        return attend(*x, visibility=table)

    assert_near(jax.vmap(call)(table, *x, ends), jax.vmap(attend)(*x, ends))


@pytest.mark.parametrize("policy", [None, "context"])
@pytest.mark.parametrize("made_before", [False, True])
def test_scan_of_remat(made_before, policy):
    policy = policy and jax.checkpoint_policies.save_only_these_names(policy)
    query, key, value, ids, _ = told_operands()

    def layers(scanned, remat, query):
        told = dict(query_segment_ids=ids)
        if made_before:
            told = dict(visibility=jax_fa3.make_visibility(ids))

        def layer(query, _):
            return dot_product_attention(query, key, value, is_causal=True, **told), None

        layer = jax.checkpoint(layer, policy=policy) if remat else layer
        if scanned:
            query, _ = jax.lax.scan(layer, query, None, length=3)
        else:
            for _ in range(3):
                query, _ = layer(query, None)
        return jnp.sum(jnp.sin(query.astype(jnp.float32)))

    got = run(jax.grad(functools.partial(layers, True, True)), query)
    assert_near(got, run(jax.grad(functools.partial(layers, False, False)), query))


def test_second_derivatives_through_xla():
    query, key, value, ids, start = told_operands()
    x = [a.astype(np.float32) for a in (query, key, value)]
    mask = (ids[:, None, :, None] == ids[:, None, None]) & (ids[:, None, :, None] != 0)
    mask = mask & (np.repeat(start, 2, 1)[..., None] <= np.arange(20))

    def product(*x, **told):
        def loss(query):
            out = dot_product_attention(query, *x[1:], implementation="xla", **told)
            return jnp.sum(jnp.sin(out))

        return jax.jvp(jax.grad(loss), x[:1], x[:1])[1]

    got = run(functools.partial(product, query_segment_ids=ids, kv_start=start), *x)
    assert_near(got, run(functools.partial(product, mask=mask), *x))


def test_export():
    """One artefact for the CPU and for CUDA, with the kernels' calls inside."""
    x = told_operands()
    names = ("forward", "backward", "visibility")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(f"jax_fa3_{name}") for name in names]
    exported = jax.export.export(
        jax.jit(gradient), platforms=("cpu", "cuda"), disabled_checks=allowed
    )(*x)
    assert all(f"@jax_fa3_{name}" in exported.mlir_module() for name in names)
    again = jax.export.deserialize(exported.serialize())
    assert_near(again.call(*x), run(gradient, *x))


def test_export_of_a_program_with_a_table():
    """As an argument and as a result, each with options that are not the defaults."""
    x = told_operands()[:3]
    ends = np.array([0, 9, 20], np.int32)
    make = functools.partial(
        jax_fa3.make_visibility,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        attention_chunk=16,
        query_offset=-3,
        window=(7, 2),
        seqlen_q=20,
        seqlen_k=20,
    )

    def call(visibility, *x):
        return dot_product_attention(*x, visibility=visibility)

    exported = [
        jax.export.deserialize(jax.export.export(jax.jit(f))(*y).serialize())
        for f, y in ((make, ()), (call, (make(), *x)))
    ]
    table = exported[0].call()
    assert isinstance(table, jax_fa3.Visibility) and table.options == make().options
    np.testing.assert_array_equal(table.table, make().table)
    assert_near(exported[1].call(table, *x), call(make(), *x))


def test_a_table_is_shown_by_its_type(capsys):
    table = jax_fa3.make_visibility(IDS)
    types = jax.eval_shape(jax_fa3.make_visibility, IDS)
    assert repr(table) == repr(types)
    assert "table=int32[2, 1, 92], options=VisibilityOptions(seqlen_q=20," in repr(table)
    assert "table=None" in repr(jax.tree.map(lambda _: None, table))
    x = jax.ShapeDtypeStruct((2, 20, 4, 64), "bfloat16")
    jax_fa3.doctor(x, visibility=table)
    assert f"visibility={table}" in capsys.readouterr().out


def test_export_of_any_batch():
    batch = jax.export.symbolic_shape("b")[0]
    x = jax.ShapeDtypeStruct((batch, 20, 2, 64), "float32")
    ids = jax.ShapeDtypeStruct((batch, 20), "int32")

    def call(x, ids):
        return dot_product_attention(x, x, x, query_segment_ids=ids)

    exported = jax.export.export(jax.jit(call))(x, ids)
    x = normal(np.random.default_rng(0), 2, 20, 2)
    assert_near(exported.call(x, IDS), call(x, IDS))


def test_a_table_is_an_argument_and_a_result():
    table = jax.jit(jax_fa3.make_visibility)(IDS)
    assert isinstance(table, jax_fa3.Visibility)
    x = told_operands()[:3]
    call = jax.jit(lambda x, table: dot_product_attention(*x, visibility=table))
    assert_near(call(x, table), dot_product_attention(*x, query_segment_ids=IDS))
    types = jax.eval_shape(jax_fa3.make_visibility, IDS)
    assert jax_fa3.is_supported(*x, visibility=types) == jax_fa3.is_supported(*x)


# ---- divided sequences


@both_kinds
def test_a_strategy_for_split_sequences_raises(kind):
    x = np.zeros((2, 32, 4, 16), "bfloat16")
    wrong = "'ring'; expected 'auto' with mask, which needs whole sequences"
    with pytest.raises(ValueError, match=wrong):
        dot_product_attention(x, x, x, mask=np.ones((32, 32), bool), sequence_parallel="ring")
    mesh = mesh_of(kind, seq=4)
    with jax.set_mesh(mesh), pytest.raises(Exception, match="'error'; expected whole sequences"):
        call = functools.partial(dot_product_attention, sequence_parallel="error")
        run(call, *place(mesh, (x, x, x), (PART,) * 3))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_context_parallelism_raises(strategy):
    x = jnp.zeros((1, 8, 4, 16), "bfloat16")
    arguments = Arguments(x, x, x, mask=jnp.ones((8, 16), bool))

    def call(x):
        return public.attention(arguments, strategy, "seq")

    mapped = jax.shard_map(call, mesh=mesh_of(seq=2), in_specs=P(None, "seq"), out_specs=PART)
    with pytest.raises(ValueError, match="mask is given; expected whole sequences"):
        jax.eval_shape(mapped, x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_context_parallelism_says_what_it_does_not_take(strategy):
    words = {
        "mask": "expected whole sequences with it: call jax_fa3.dot_product_attention",
        "bias": "expected whole sequences",
        "query_descale": "expected bfloat16, float16 or float32 inputs",
        "sequence_parallel": "expected dot_product_attention with it",
    }
    x = jnp.zeros((1, 8, 4, 16), "bfloat16")
    for name, expected in words.items():
        with pytest.raises(TypeError, match=f"{strategy}_attention takes no {name}; {expected}"):
            STRATEGIES[strategy](x, x, x, axis_name="seq", **{name: None})
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        STRATEGIES[strategy](x, x, x, axis_name="seq", dropout=0.1)


def test_varlen_with_a_table_made_before():
    rng = np.random.default_rng(6)
    x = [normal(rng, 1, 60, heads)[0] for heads in (4, 2, 2)]
    cu_q, cu_k = (np.array(ends, np.int32) for ends in ([0, 20, 55, 60], [0, 30, 30, 50]))
    call = functools.partial(jax_fa3.flash_attention_varlen, *x, cu_q, causal=True)
    table = jax_fa3.make_visibility(cu_seqlens_q=cu_q, seqlen_q=60)
    np.testing.assert_array_equal(call(), call(visibility=table))
    np.testing.assert_array_equal(call(), call(cu_q))
    table = jax_fa3.make_visibility(
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, seqlen_q=60, seqlen_k=60
    )
    np.testing.assert_array_equal(call(cu_k), call(cu_k, visibility=table))


def test_numbers_as_numpy_and_python_have_them():
    """int64 arrays and lists, whose values fit int32."""
    x = np.zeros((1, 4, 2, 32), "bfloat16")
    for ids in (np.array([[1, 1, 2, 0]]), [[1, 1, 2, 0]]):
        assert dot_product_attention(x, x, x, query_segment_ids=ids).shape == x.shape
    assert dot_product_attention(x[0], x[0], x[0], query_segment_ids=[1, 1, 2, 0]).shape == (
        4,
        2,
        32,
    )
    assert dot_product_attention(x, x, x, attention_chunk=np.int64(2)).shape == x.shape


@pytest.mark.parametrize("shape", [(1, 4, 1, 2), (1, 12, 1, 8), (1, 64, 4, 8), (2, 12, 4, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_ids_that_come_back_are_nan(shape, dtype):
    """Of small shapes too, of which XLA makes one kernel."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=shape).astype(dtype) for _ in range(3))
    ids = np.ones(shape[:2], np.int32)
    ids[:, 1] = 2

    def loss(query, key, value, ids):
        out = jax_fa3.dot_product_attention(query, key, value, query_segment_ids=ids)
        return out.astype("float32").sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    for _ in range(3):
        for gradient in gradients(query, key, value, ids):
            assert np.isnan(np.asarray(gradient, np.float32)).all()
