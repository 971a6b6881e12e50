"""The float8 kernels: forward through the public call, rounding beside XLA's.

Rows that nothing may read hold NaN; so does the memory that results are put into.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import FEATURES, HEAD_DIM_PAIRS, HEADS, KERNELS, SHAPES, resolve

from cases import Case
from float8 import (
    FLOAT8,
    NAN,
    check_on_tensor_cores,
    check_values_with_a_mean,
    make,
    wide,
)
from jax_fa3 import dot_product_attention, ffi, quantize_qkv
from jax_fa3.float8.rounding import prepare_value, quantize, rounded
from jax_fa3.operands import Operands
from jax_fa3.options import BLOCK, num_blocks, padded_keys
from transforms import assert_near


def prepared(x):
    """With value as the kernels read it, and NaN for the keys up to a whole block."""
    batch, seqlen, heads, dim = x.value.shape
    value = np.full((batch, padded_keys(seqlen), heads, dim), NAN).view(FLOAT8)
    value[:, :seqlen] = x.value
    return x._replace(value=prepare_value(jnp.asarray(value)))


def run(case, x, value_is_prepared=False, repeats=1):
    """out and lse; of several runs, which must all have the same bits."""
    call = functools.partial(
        dot_product_attention,
        **case.options,
        value_is_prepared=value_is_prepared,
        return_residual=True,
        implementation="fa3",
    )
    operands = x._asdict() | case.index_arrays
    executable = jax.jit(lambda operands: call(**operands)).lower(operands).compile()
    operands = jax.device_put(operands)
    first = None
    for _ in range(repeats):
        KERNELS.prepare(executable)
        got = [np.asarray(result) for result in executable(operands)]
        first = first or got
        for name, a, b in zip(("out", "lse"), first, got, strict=True):
            assert a.tobytes() == b.tobytes(), f"{name} differs between runs"
    return first


def walk():
    """For every head dim a walk through shapes, heads and features, which differ in period."""
    combinations = zip(
        itertools.cycle(SHAPES), itertools.cycle(HEADS), itertools.cycle(FEATURES), strict=False
    )
    for head_dim, head_dim_v in HEAD_DIM_PAIRS:
        for (sq, sk), (hq, hkv), feature in itertools.islice(combinations, 4):
            yield Case(
                batch=1,
                seqlen_q=sq,
                seqlen_k=sk,
                heads_q=hq,
                heads_kv=hkv,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                **resolve(feature, sq, sk),
            )
    for head_dim, head_dim_v in ((16, 16), (48, 80), (112, 112), (160, 32), (240, 208)):
        yield Case(
            batch=2,
            seqlen_q=150,
            seqlen_k=330,
            heads_q=4,
            heads_kv=2,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            causal=True,
            offset=(180, -20),
            key_lengths=(330, 77),
        )
    yield Case(
        batch=3, seqlen_q=200, seqlen_k=260, key_lengths=(0, 1, 260), query_lengths=(200, 7, 0)
    )


@pytest.mark.parametrize("case", list(walk()), ids=lambda case: case.name)
def test_against_float64(case):
    """Both layouts of value, whose bits agree; one scale for 128 rows and one for a head."""
    x = make(case)
    plain = run(case, x)
    check_on_tensor_cores(case, plain, x)
    for a, b in zip(plain, run(case, prepared(x), value_is_prepared=True), strict=True):
        assert a.tobytes() == b.tobytes()
    if case.heads_q != case.heads_kv:
        x = make(case, by_block=False)
        check_on_tensor_cores(case, run(case, x), x)


@pytest.mark.parametrize("head_dims", HEAD_DIM_PAIRS, ids=str)
@pytest.mark.parametrize("value_is_prepared", (False, True), ids=("plain", "prepared"))
def test_one_key_a_row(head_dims, value_is_prepared):
    """A row that sees one key gives that key's value to the bit, wherever it stands in its tile."""
    case = Case(
        batch=2,
        seqlen_q=500,
        seqlen_k=500,
        heads_q=4,
        heads_kv=2,
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        window=(0, 0),
        offset=(3, -70),
        key_lengths=(500, 391),
    )
    x = make(case)
    x = x._replace(value_descale=np.full_like(x.value_descale, 0.25))
    out, _ = run(case, prepared(x) if value_is_prepared else x, value_is_prepared)
    value = np.repeat(np.nan_to_num(x.value.astype(np.float32)) * 0.25, 2, axis=2)
    for b, (offset, length) in enumerate(zip(case.offset, case.key_lengths, strict=True)):
        keys = np.arange(500) + offset
        seen = (keys >= 0) & (keys < length)
        want = np.where(seen[:, None, None], value[b, np.where(seen, keys, 0)], 0)
        np.testing.assert_array_equal(out[b], want.astype(out.dtype))


@pytest.mark.parametrize("head_dim", (64, 96, 128, 192, 256))
def test_many_keys(head_dim):
    """The last rows of a long sequence."""
    case = Case(
        batch=1,
        seqlen_q=300,
        seqlen_k=20_000,
        heads_q=2,
        heads_kv=1,
        head_dim=head_dim,
        causal=True,
        offset=19_700,
    )
    x = make(case)
    check_on_tensor_cores(case, run(case, x), x)


@pytest.mark.parametrize("keys", (1000, 4096, 30_000))
@pytest.mark.parametrize("head_dims", (*HEAD_DIM_PAIRS, (80, 48)), ids=str)
def test_values_with_a_mean(head_dims, keys):
    """The tensor cores' sums are short enough, and weights add up to 1, at every head dim."""
    case = Case(
        batch=1,
        seqlen_q=150,
        seqlen_k=keys,
        heads_q=2,
        heads_kv=1,
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        causal=keys == 4096,
        offset=keys - 150 if keys == 4096 else 0,
    )
    check_values_with_a_mean(case, lambda x: run(case, x))


def test_causal_values_of_one():
    """Rows of few keys, too."""
    case = Case(batch=1, seqlen_q=700, seqlen_k=700, heads_q=2, heads_kv=2, causal=True)
    check_values_with_a_mean(case, lambda x: run(case, x))


@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("last", (0, 9), ids=("falling", "rising"))
def test_weights_that_outgrow_float32(head_dim, last):
    """Logits that grow by 2^120 and more from one key tile to the next, all of them exact."""
    case = Case(batch=1, seqlen_q=200, seqlen_k=1000, heads_q=2, heads_kv=1, head_dim=head_dim)
    x = make(case)
    tile = np.abs(np.arange(case.seqlen_k) // 100 - last)  # grows from right to left, or falls
    for array, column in ((x.query, 64), (x.key, 24 * tile[None, :, None])):
        array.view(np.uint8)[:] = 0
        array[..., 0] = column
    for descale in (x.query_descale, x.key_descale):
        descale[:] = 1
    check_on_tensor_cores(case, run(case, x), x)


@pytest.mark.parametrize("head_dim", (64, 128))
def test_negative_logits(head_dim):
    """Row maxima that are negative and grow; the second head's end positive."""
    case = Case(batch=1, seqlen_q=200, seqlen_k=700, heads_q=2, heads_kv=2, head_dim=head_dim)
    x = make(case)
    x.query.view(np.uint8)[:] &= 0x7F
    x.key.view(np.uint8)[:] |= 0x80
    x.key.view(np.uint8)[:, :BLOCK, 1] &= 0x7F
    x.key_descale[:] *= np.linspace(0.3, 1, num_blocks(case.seqlen_k), dtype=np.float32)
    check_on_tensor_cores(case, run(case, x), x)


def test_descales_of_zero():
    """Blocks of zeros, quantised with a scale of zero, are logits of zero."""
    case = Case(
        batch=1, seqlen_q=256, seqlen_k=384, heads_q=2, heads_kv=1, head_dim=64, causal=True
    )
    x = make(case)
    x.key.view(np.uint8)[:, BLOCK : 2 * BLOCK] = 0
    x.key_descale[:, :, 1] = 0
    x.query.view(np.uint8)[:, :BLOCK] = 0
    x.query_descale[:, :, 0] = 0
    check_on_tensor_cores(case, run(case, x), x)


@pytest.mark.parametrize("head_dims", HEAD_DIM_PAIRS, ids=str)
@pytest.mark.parametrize(
    "options",
    (dict(), dict(causal=True), dict(window=(150, 70), key_lengths=(800, 650))),
    ids=("dense", "causal", "window"),
)
def test_bits_repeat(head_dims, options):
    case = Case(
        batch=2,
        seqlen_q=1000,
        seqlen_k=800,
        heads_q=16,
        heads_kv=4,
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        **options,
    )
    run(case, make(case), repeats=20)


@pytest.mark.parametrize(
    ("head_dims", "dtype"),
    (((64, 64), "bfloat16"), ((192, 128), "float16"), ((256, 256), "bfloat16")),
    ids=str,
)
def test_forward_dtype(head_dims, dtype):
    """Rounded, forward in float8 and backward in 16 bits: as XLA has it, up to what rounds
    the other way where blocks of keys are other ones."""
    case = Case(
        seqlen_q=300,
        seqlen_k=410,
        heads_q=4,
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        dtype=dtype,
        causal=True,
        offset=110,
        query_lengths=(300, 200),
        key_lengths=(330, 410),
    )
    *arrays, dout, dlse = case.inputs()

    def attend(*arrays, implementation):
        return dot_product_attention(
            *arrays,
            **case.options,
            **case.index_arrays,
            forward_dtype=FLOAT8,
            implementation=implementation,
            return_residual=True,
        )

    def results(implementation):
        call = functools.partial(attend, implementation=implementation)
        primals, vjp = jax.vjp(call, *arrays)
        return jax.tree.map(np.array, (*primals, *vjp((jnp.asarray(dout), jnp.asarray(dlse)))))

    got, want = results("fa3"), results("xla")
    assert got[0].dtype == dtype
    blind = np.isneginf(want[1])
    assert np.array_equal(np.isneginf(got[1]), blind)
    for _, lse, *_ in (got, want):
        lse[blind] = 0
    assert_near(got, want, relative=0.06)


def rounding_case(head_dim, dtype):
    return Case(
        batch=3,
        seqlen_q=300,
        seqlen_k=410,
        heads_q=4,
        heads_kv=2,
        head_dim=head_dim,
        head_dim_v=272 - head_dim,
        dtype=dtype,
        query_lengths=(300, 0, 129),
        key_lengths=(0, 410, 128),
    )


def arrays_of(function, operands):
    return tuple(jax.jit(function)(operands).present().values())


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_rounding(head_dim, dtype):
    """As XLA has it, but for sums in another order: an ulp of a scale, few elements by a step."""
    case = rounding_case(head_dim, dtype)
    arrays = [jnp.asarray(x) for x in case.inputs()[:3]]
    lengths = (jnp.asarray(n, jnp.int32) for n in (case.query_lengths, case.key_lengths))
    operands = Operands(
        *arrays, **dict(zip(("query_lengths", "key_lengths"), lengths, strict=True))
    )
    want = arrays_of(lambda x: quantize(x)[0], operands)
    got, prepared, back = (
        arrays_of(functools.partial(ffi.quantize, **how), operands)
        for how in ({}, dict(prepare_value=True), dict(back=True))
    )
    for g, w in zip(got[3:], want[3:], strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6)
    same = (*got[:2], prepare_value(got[2]), *got[3:])
    for g, w in zip(prepared, same, strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()
    of_xla = (*want[:3], *arrays_of(rounded, operands))
    for g, w in zip((*got[:3], *back), of_xla, strict=True):
        is_float8 = w.dtype.itemsize == 1
        g, w = wide(g), wide(w)
        assert g.shape == w.shape
        # Elements between two float8 go either way, to a neighbour, and few: up to 6.4e-3 measured.
        if is_float8:
            assert np.all(abs(g - w) <= np.maximum(np.maximum(abs(g), abs(w)) / 8, 2**-9))
        assert np.mean(g != w) < 0.02
        assert np.linalg.norm(g - w) <= 1e-2 * np.linalg.norm(w)


@pytest.mark.parametrize("prepare", (False, True))
def test_quantize_qkv(prepare):
    """The public call has the kernels' bits, and as little as XLA's own rounding saturates."""
    case = rounding_case(128, "bfloat16")
    arrays = [jnp.asarray(x) for x in case.inputs()[:3]]
    lengths = dict(
        query_seq_lengths=jnp.asarray(case.query_lengths, jnp.int32),
        key_value_seq_lengths=jnp.asarray(case.key_lengths, jnp.int32),
    )
    how = dict(prepare_value=prepare)
    got, saturated = quantize_qkv(*arrays, rotation_seed=5, **how, **lengths, return_saturated=True)
    operands = dict(zip(("query_lengths", "key_lengths"), lengths.values(), strict=True))
    operands = Operands(*arrays, **operands)
    want = arrays_of(functools.partial(ffi.quantize, seed=5, **how), operands)
    for g, w in zip(got, want, strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()
    of_xla = jax.jit(lambda x: quantize(x, seed=5)[1])(operands)
    assert [int(n) for n in (*saturated, *of_xla)] == [0] * 6
    head = quantize_qkv(*arrays, granularity="head", **lengths)
    assert head.query_descale.shape == (3, 4, 1)


def test_refusals_name_the_reason():
    x = make(Case(head_dim=72))
    with pytest.raises(NotImplementedError, match="head_dim must be a multiple of 16 for float8"):
        dot_product_attention(**x._asdict(), implementation="fa3")


@pytest.mark.parametrize("granularity", ("tensor", "head"))
def test_infinity_becomes_nan_where_xla_rounds(granularity):
    """XLA's own conversion saturates on GPUs."""
    query = jnp.ones((1, 4, 1, 32), jnp.bfloat16).at[0, 1, 0, 3].set(jnp.inf)
    key = jnp.ones_like(query).at[0, 2, 0, 5].set(-jnp.inf)
    quantized = quantize_qkv(
        query, key, jnp.ones_like(query), granularity=granularity, rotation_seed=None
    )
    for x, place in ((quantized.query, (0, 1, 0, 3)), (quantized.key, (0, 2, 0, 5))):
        is_nan = np.isnan(np.asarray(x).astype(np.float32))
        assert is_nan[place] and is_nan.sum() == 1
