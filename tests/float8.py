"""What the tests of float8 share: arrays, and their meaning in float64."""

import numpy as np

FLOAT8 = "float8_e4m3fn"


def wide(x):
    return np.asarray(x).astype(np.float64)


def by_row(descale, seqlen):
    """[batch, heads, blocks] to [batch, seqlen, heads, 1]."""
    rows = np.repeat(wide(descale), 128 if descale.shape[-1] > 1 else seqlen, axis=-1)
    return np.swapaxes(rows[..., :seqlen], 1, 2)[..., None]


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
