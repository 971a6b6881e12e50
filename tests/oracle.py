"""The oracle: attention and its gradients by explicit formulas, sharing nothing with jax_fa3.

One set of formulas serves three readers through two switches:

    precision="exact"   float64 throughout: the reference every result is compared with
    precision=<dtype>   float32 arithmetic that rounds to the dtype wherever a same-precision
                        implementation (jax.nn.dot_product_attention and its derivative) stores
                        one: probabilities, output, dP, dS, gradients.  Its error sets the bound.
    xp=numpy or jax.numpy   where the arrays live (jax.numpy needs jax.enable_x64)

Layouts are the public ones: query [B, Sq, Hq, D], key and value [B, Sk, Hkv, D], lse [B, Sq, Hq].
"""

import dataclasses

import ml_dtypes  # registers bfloat16 with numpy
import numpy as np

TANH_ERROR = 2.0**-11  # relative, of the instruction that the kernels take for it
# A gradient that is a sum over rows, as of sinks or of a bias that rows share, has many roundings
# in each number, which are as good as random. The largest sum of them in few numbers does not tell
# how large another may be: the same-precision reading is off by this many of their standard
# deviations, in all of few numbers, else in the one where they may come to most.
SPREADS = 3
FEW = 16


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything one call can return; arrays of numpy or jax."""

    out: np.ndarray  # [B, Sq, Hq, D]
    lse: np.ndarray  # [B, Sq, Hq], natural log, -inf where a row sees no key
    dquery: np.ndarray
    dkey: np.ndarray
    dvalue: np.ndarray
    dbias: np.ndarray | None = None  # where it was asked for
    dsinks: np.ndarray | None = None  # where there are sinks
    max_logits: np.ndarray | None = None  # [B, Hq], where they were asked for

    def items(self):
        arrays = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [(name, x) for name, x in arrays if x is not None]


def visible(
    batch,
    seqlen_q,
    seqlen_k,
    *,
    is_causal=False,
    window=None,
    offset=None,
    query_lengths=None,
    key_lengths=None,
    **told,
):
    """Which key each query row sees, [B, Hq or 1, Sq, Sk] of bool, from the words of the
    documentation."""
    left, right = (None, None) if window is None else np.broadcast_to(window, (2,)).tolist()
    if is_causal:
        right = 0 if right is None else min(right, 0)
    offset = np.broadcast_to(np.int64(0 if offset is None else offset), (batch,))
    row = np.arange(seqlen_q)[None, :, None]
    column = np.arange(seqlen_k)[None, None, :]
    position = row + offset[:, None, None]
    sees = np.ones((batch, seqlen_q, seqlen_k), bool)
    if left is not None:
        sees &= column >= position - left
    if right is not None:
        sees &= column <= position + right
    if query_lengths is not None:
        sees &= row < np.asarray(query_lengths)[:, None, None]
    if key_lengths is not None:
        sees &= column < np.asarray(key_lengths)[:, None, None]
    return sees[:, None] & visible_by_arrays(batch, seqlen_q, seqlen_k, offset=offset, **told)


def visible_by_arrays(
    batch,
    seqlen_q,
    seqlen_k,
    *,
    offset=None,
    query_ids=None,
    key_ids=None,
    start=None,
    end=None,
    chunk=None,
):
    """What segment ids, key intervals ([B, Hq or 1, Sq]) and chunks let rows see."""
    column = np.arange(seqlen_k)
    sees = np.ones((batch, 1, seqlen_q, seqlen_k), bool)
    if query_ids is not None:
        key_ids = query_ids if key_ids is None else key_ids
        row_id = np.asarray(query_ids)[:, None, :, None]
        sees &= (row_id == np.asarray(key_ids)[:, None, None]) & (row_id != 0)
    if start is not None:
        sees = sees & (column >= np.asarray(start)[..., None])
    if end is not None:
        sees = sees & (column < np.asarray(end)[..., None])
    if chunk is not None:
        offset = np.broadcast_to(np.int64(0 if offset is None else offset), (batch,))
        position = np.arange(seqlen_q) + offset[:, None]
        sees = sees & (column // chunk == (position // chunk)[:, None, :, None])
    return sees


def used(seqlen, lengths, batch):
    """Rows before their sequence's length, [B, S] of bool."""
    if lengths is None:
        return np.ones((batch, seqlen), bool)
    return np.arange(seqlen)[None] < np.asarray(lengths)[:, None]


def over_shared(x, shape, reduce=np.sum):
    """x [B, H, Sq, Sk] reduced to `shape`: [f, Hq or 1, Sq or 1, Sk or 1] where f divides B and
    each of the f serves B / f sequences in a row."""
    batch, *others = x.shape
    x = reduce(x.reshape(shape[0], batch // shape[0], *others), axis=1)
    axes = tuple(i for i, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n < m)
    return reduce(x, axis=axes, keepdims=True) if axes else x


def attention(
    query,
    key,
    value,
    dout,
    dlse,
    *,
    sees,
    query_used,
    key_used,
    scale,
    bias=None,
    distance=None,
    slopes=None,
    softcap=None,
    sinks=None,
    row_exists=None,
    change=None,
    precision="exact",
    xp=np,
):
    """Output, LSE and gradients of <out, dout> + <lse, dlse>; see `visible` and `used`.

    A bias has the shape that `over_shared` reduces to, and so has its gradient; what it holds
    where a row does not see the key counts for nothing. Slopes and sinks are [f, Hq], where f
    divides B likewise, the distances that slopes multiply [B, Sq, Sk]. Rows that do not exist,
    [B, Hq or 1, Sq], have no sink. `change` is a function of the scores [B, Hq, Sq, Sk] that gives
    others and their derivative.
    """
    work = xp.float64 if precision == "exact" else xp.float32

    def by_sequence(x):
        """Each plane as often as there are sequences that it serves."""
        return xp.repeat(xp.asarray(x).astype(work), query.shape[0] // x.shape[0], axis=0)

    def rounded(x):
        return x if precision == "exact" else x.astype(precision).astype(work)

    # Of a number 1, at most what rounding takes or adds.
    half_step = 0 if precision == "exact" else float(ml_dtypes.finfo(precision).eps) / 2

    def by_head(x, rows):
        """[B, S, H, D] to [B, H, S, D] in the working precision; padding rows read as zero."""
        x = xp.where(rows[:, :, None, None], x.astype(work), 0)
        return xp.swapaxes(x, 1, 2)

    group = query.shape[2] // key.shape[2]
    q, do = by_head(query, query_used), by_head(dout, query_used)
    k, v = (xp.repeat(by_head(x, key_used), group, axis=1) for x in (key, value))
    dl = by_head(dlse[..., None], query_used)
    sees = sees[:, None] if sees.ndim == 3 else sees  # one mask for all heads, or one for each

    scores = (q @ xp.swapaxes(k, 2, 3)) * work(scale)
    if bias is not None:
        scores = scores + by_sequence(bias)
    if slopes is not None:
        scores = scores - by_sequence(slopes)[..., None, None] * distance[:, None].astype(work)
    slope = 1
    if softcap is not None:
        tanh = xp.tanh(scores / work(softcap))
        if precision not in ("exact", "float32"):
            tanh = tanh * work(1 - TANH_ERROR)
        scores, slope = work(softcap) * tanh, 1 - tanh * tanh
    if change is not None:
        scores, slope = (xp.asarray(x).astype(work) for x in change(scores))
    scores = xp.where(sees, scores, -xp.inf)
    max_logits = xp.max(scores, axis=(2, 3), initial=-np.inf)
    row_max = xp.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        sink, exists = by_sequence(sinks)[..., None, None], row_exists[..., None]
        row_max = xp.maximum(row_max, xp.where(exists, sink, -xp.inf))
    row_max = xp.where(row_max == -xp.inf, 0, row_max)  # a row that sees nothing
    weights = xp.where(sees, xp.exp(scores - row_max), 0)
    row_sum = xp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        row_sum = row_sum + xp.where(exists, xp.exp(sink - row_max), 0)
    empty = row_sum == 0
    lse = xp.where(empty, -xp.inf, row_max + xp.log(xp.where(empty, 1, row_sum)))
    probs = weights / xp.where(empty, 1, row_sum)
    out = rounded(rounded(probs) @ v)

    dprobs = rounded(do @ xp.swapaxes(v, 2, 3))
    delta = xp.sum(do * out, axis=-1, keepdims=True)
    dlogits = rounded(probs * (dprobs - delta + dl) * slope)
    dsinks = None
    if sinks is not None:
        weight = xp.where(exists, xp.exp(sink - xp.where(empty, 0, lse)), 0)
        terms = do * (probs @ v)
        of_rows = weight * (dl - xp.sum(terms, axis=-1, keepdims=True))
        deviations = weight * half_step * xp.sqrt(xp.sum(terms**2, axis=-1, keepdims=True))

        def over_rows(x):
            x = xp.sum(x, axis=2, keepdims=True)
            return over_shared(x, (*sinks.shape, 1, 1), xp.sum)[..., 0, 0]

        dsinks = over_rows(of_rows) + SPREADS * xp.sqrt(over_rows(deviations**2))
    dbias = None
    if bias is not None:
        dbias = over_shared(dlogits, bias.shape, xp.sum)
        if dbias.size < max(FEW, dlogits.size):
            squares = over_shared((half_step * dlogits) ** 2, bias.shape, xp.sum)
            least = 0 if dbias.size < FEW else xp.max(squares)
            dbias = dbias + xp.where(squares >= least, SPREADS * xp.sqrt(squares), 0)
    dscores = dlogits * work(scale)
    dq = dscores @ k
    dk = xp.swapaxes(dscores, 2, 3) @ q
    dv = xp.swapaxes(rounded(probs), 2, 3) @ do

    def by_position(x):
        return rounded(xp.swapaxes(x, 1, 2))

    def over_group(x):
        batch, heads, rows, dim = x.shape
        return x.reshape(batch, heads // group, group, rows, dim).sum(axis=2)

    return Results(
        by_position(out),
        xp.swapaxes(lse, 1, 2)[..., 0],
        by_position(dq),
        by_position(over_group(dk)),
        by_position(over_group(dv)),
        None if bias is None else rounded(dbias),
        dsinks,
        max_logits,
    )
