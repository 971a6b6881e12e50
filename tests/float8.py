"""What the tests of float8 share: arrays, their meaning in float64, and the oracle.

The oracle is written out here once more, densely in numpy, with the roundings that docs/fp8.md
names: that is the same-precision reading of the tolerance rule, and without them the exact one.
"""

import zlib

import ml_dtypes
import numpy as np

import tolerance
from jax_fa3 import QuantizedQKV, quantize_qkv
from jax_fa3.options import num_blocks

FLOAT8 = "float8_e4m3fn"
NAN = np.uint8(0x7F)


def wide(x):
    return np.asarray(x).astype(np.float64)


def by_row(descale, seqlen):
    """[batch, heads, blocks] to [batch, seqlen, heads, 1]."""
    rows = np.repeat(wide(descale), 128 if descale.shape[-1] > 1 else seqlen, axis=-1)
    return np.swapaxes(rows[..., :seqlen], 1, 2)[..., None]


def quantised(case):
    """The QuantizedQKV of a case's inputs."""
    lengths = {n: x for n, x in case.index_arrays.items() if n.endswith("_seq_lengths")}
    return quantize_qkv(*case.inputs()[:3], **lengths)


def dequantised(x):
    """query, key and value of a QuantizedQKV in float64, in the rotated basis."""
    return (
        wide(x.query) * by_row(x.query_descale, x.query.shape[1]),
        wide(x.key) * by_row(x.key_descale, x.key.shape[1]),
        wide(x.value) * by_row(x.value_descale[..., None], x.value.shape[1]),
    )


def operands(seed=0, batch=2, seqlen=140, heads=2, head_dim=16, dtype="bfloat16"):
    """query, key, value with outliers; every (batch, head) and every block of another size."""
    rng = np.random.default_rng(seed)
    arrays = rng.standard_normal((3, batch, seqlen, heads, head_dim))
    arrays *= 1 + 20 * (rng.random(arrays.shape) < 0.01)
    arrays *= 1 + np.arange(batch)[:, None, None, None] + 3 * np.arange(heads)[:, None]
    arrays[:, :, 128:] *= 10
    return tuple(x.astype(np.float32).astype(dtype) for x in arrays)


def make(case, by_block=True):
    """Random arrays, NaN where nothing may read, made without JAX; scales of query and key for 128
    rows or for a head."""
    rng = np.random.default_rng(zlib.crc32(f"{case.name} {by_block}".encode()))

    def quantise(seqlen, heads, dim, used, blocks):
        x = rng.standard_normal((case.batch, seqlen, heads, dim), np.float32)
        descale = rng.uniform(0.01, 0.04, (case.batch, heads, blocks)).astype(np.float32)
        stored = np.clip(x / by_row(descale, seqlen), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        stored.view(np.uint8)[~used] = NAN
        return stored, descale

    blocks = (num_blocks(n) if by_block else 1 for n in (case.seqlen_q, case.seqlen_k))
    query, query_descale = quantise(
        case.seqlen_q, case.heads_q, case.head_dim, case.query_used, next(blocks)
    )
    key, key_descale = quantise(
        case.seqlen_k, case.heads_kv, case.head_dim, case.key_used, next(blocks)
    )
    head_dim_v = case.head_dim_v or case.head_dim
    value, value_descale = quantise(case.seqlen_k, case.heads_kv, head_dim_v, case.key_used, 1)
    return QuantizedQKV(query, key, value, query_descale, key_descale, value_descale[..., 0])


def check(case, got, arrays, products="exact"):
    """`got`, (out, lse) of a call, against the oracle on the dequantised `arrays`.

    Of products on "tensor cores" an LSE has a bound of its own: they keep about 13 bits of a sum of
    8-bit products, so that a score is known to 2^-10 of the largest.
    """
    out, lse = got
    group = case.heads_q // case.heads_kv
    query, key, value = (np.swapaxes(x, 1, 2) for x in arrays)
    key, value = (np.repeat(x, group, axis=1) for x in (key, value))
    scores = case.softmax_scale * (query @ np.swapaxes(key, 2, 3))
    sees = case.sees
    row_max = np.max(scores, -1, keepdims=True, initial=-np.inf, where=sees)
    with np.errstate(divide="ignore"):
        weights = np.where(sees, np.exp(scores - np.where(np.isneginf(row_max), 0, row_max)), 0)
        row_sum = weights.sum(-1, keepdims=True)
        exact_lse = np.swapaxes((row_max + np.log(row_sum))[..., 0], 1, 2)
    rounded = wide((256 * weights).astype(ml_dtypes.float8_e4m3fn)) / 256

    def normalized(weights):
        row_sum = weights.sum(-1, keepdims=True)
        return weights / np.where(row_sum == 0, 1, row_sum)

    exact, same = (np.swapaxes(normalized(w) @ value, 1, 2) for w in (weights, rounded))
    tolerance.check("out", out, exact, same)
    if products == "exact":
        tolerance.check("lse", lse, exact_lse, exact_lse.astype(np.float32))
    else:
        largest = np.max(np.abs(scores), initial=0, where=sees)
        np.testing.assert_allclose(lse, exact_lse, rtol=0, atol=2.0**-10 * (1 + largest))
    blind = case.blind
    assert not np.any(np.asarray(out)[blind])
    assert np.all(np.isneginf(np.asarray(lse)[blind]))


def check_on_tensor_cores(case, got, x):
    arrays = zip(x[:3], (*x[3:5], x.value_descale[..., None]), strict=True)
    wide_arrays = [np.nan_to_num(wide(a)) * by_row(scale, a.shape[1]) for a, scale in arrays]
    check(case, got, wide_arrays, products="tensor cores")


def check_values_with_a_mean(case, attend):
    """Weights that add up to 1, and sums that lose nothing: `attend` gives out and lse of a
    QuantizedQKV, made from the case's query and key and from values that do not cancel."""
    query, key, noise = case.inputs()[:3]
    position = np.arange(case.seqlen_k)[:, None, None]
    half = case.seqlen_k // 2
    values = {
        "ones": 1,
        "the first half": position < half,
        "the last half": position >= half,
        "every second": position % 2 == 0,
        "noise around 1": 1 + noise.astype(np.float32),
    }
    for name, value in values.items():
        value = np.broadcast_to(np.float32(value), noise.shape).astype(noise.dtype)
        x = quantize_qkv(query, key, value)
        out, lse = map(wide, attend(x))
        query8, key8, value8 = (np.swapaxes(a, 1, 2) for a in dequantised(x))
        key8, value8 = (np.repeat(a, case.heads_q // case.heads_kv, 1) for a in (key8, value8))
        scores = case.softmax_scale * (query8 @ np.swapaxes(key8, 2, 3))
        scores = np.where(case.sees, scores, -np.inf)
        row_max = scores.max(-1, keepdims=True)
        weights = np.exp(scores - row_max)
        row_sum = weights.sum(-1, keepdims=True)
        exact = np.swapaxes((weights / row_sum) @ value8, 1, 2)
        if name == "ones":
            assert np.abs(out - 1).max() <= 0.004, f"{name}: {np.abs(out - 1).max():.2e}"
        error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
        assert error <= 0.006, f"{name}: {error:.2e}"
        exact_lse = np.swapaxes((row_max + np.log(row_sum))[..., 0], 1, 2)
        np.testing.assert_allclose(lse, exact_lse, rtol=0, atol=1e-3)
