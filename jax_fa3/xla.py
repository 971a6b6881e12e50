"""Attention through XLA, block by block over the keys: any platform, all of the semantics.

The forward pass is the online softmax (arXiv:2205.14135), a scan over key blocks that carries
the row maximum, the row sum and the output; the backward pass recomputes each block's
probabilities from the LSE. Memory grows linearly with the sequence lengths; a call of few scores is
one block, without a loop. Products accumulate in float32; probabilities and dS are rounded to the
input dtype between products, as in the kernels.

Letters in einsums and comments: b batch, q query rows, k key rows of one block, h key/value
heads, g query heads of one key/value head, d head_dim, e head_dim of value. Scores are [b, h, q,
g, k] in float32, so that heads are never repeated in memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa3 import mask, score
from jax_fa3.float8 import rounding
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import FLOAT8, AttentionOptions

SCORES_AT_ONCE = 1 << 24  # float32 scores of a call that is one block: 64 MiB
SCORES_PER_BLOCK = 1 << 25  # of a block of one that is not, as far as MIN_BLOCK allows
MIN_BLOCK = 128  # key rows
MAX_BLOCK = 1024
PROBS_SCALE = 2.0**8  # of probabilities in float8: at most 256, where float8 ends at 448


def forward(options: AttentionOptions, operands: Operands) -> Outputs:
    problem = (_Float8Problem if operands.is_float8 else _Problem)(options, operands)
    query, head_dim_v = operands.query, operands.extents.head_dim_v
    rows = problem.rows()

    def step(carry, start):
        row_max, row_sum, acc = carry
        block = problem.block(start)
        scores = problem.scores(rows, block)
        new_max = lax.stop_gradient(jnp.maximum(row_max, scores.max(-1)))
        safe_max = _finite_or_zero(new_max)
        probs = jnp.exp(scores - safe_max[..., None])
        rescale = jnp.exp(row_max - safe_max)
        row_sum = row_sum * rescale + probs.sum(-1)
        acc = acc * rescale[..., None] + problem.weigh(probs, block)
        return (new_max, row_sum, acc), None

    b, q, h, g, _ = rows.shape
    stats = _full(query, (b, h, q, g), -jnp.inf)
    sums = _full(query, (*stats.shape, head_dim_v + problem.more_columns), 0)
    init = (stats, _full(query, stats.shape, 0), sums)
    (row_max, row_sum, acc), _ = problem.over_blocks(step, init)

    empty = row_sum == 0
    row_sum = jnp.where(empty, 1, row_sum)
    out = problem.normalize(acc, row_sum)
    out = jnp.moveaxis(out, 1, 2).reshape(*query.shape[:-1], out.shape[-1])
    lse = jnp.where(empty, -jnp.inf, _finite_or_zero(row_max) + jnp.log(row_sum))
    lse, of_keys = score.with_sink(problem.sinks, lse, problem.is_row)
    if of_keys is not None:
        out *= jnp.moveaxis(of_keys, 1, 2).reshape(*query.shape[:-1], 1)
    lse = jnp.moveaxis(lse, 3, 2).reshape(b, h * g, q)
    max_logits = None
    if options.return_max_logits:
        max_logits = row_max.max(2, initial=-jnp.inf).reshape(b, h * g)
    is_illegal = mask.is_illegal(operands, q)
    if is_illegal is not None:
        lse = jnp.where(is_illegal, jnp.nan, lse)
        out = jnp.where(jnp.moveaxis(is_illegal, 1, 2)[..., None], jnp.nan, out)
        if max_logits is not None:
            max_logits = jnp.where(is_illegal.any(2), jnp.nan, max_logits)
    return Outputs(out.astype(options.out_dtype or query.dtype), lse, max_logits)


def backward(
    options: AttentionOptions, operands: Operands, outputs: Outputs, cotangents: Outputs
) -> Operands:
    problem = _Problem(options, operands)
    query, key, value, bias = operands.query, operands.key, operands.value, operands.bias
    sinks = operands.sinks
    differentiable = operands.differentiable(options)
    wants_dbias = differentiable.bias is not None
    dout, dlse = cotangents.out, cotangents.lse
    rows = problem.rows()
    b, q, h, g, _ = rows.shape
    dout = problem.query_heads(problem.zero_past_length(dout))
    products = dout.astype(jnp.float32) * problem.query_heads(outputs.out).astype(jnp.float32)
    delta = jnp.moveaxis(products.sum(-1), 1, 2)
    if dlse is not None:
        dlse = problem.zero_past_length(jnp.moveaxis(dlse, 1, 2))  # [b, q, h * g]
        delta -= jnp.moveaxis(dlse.reshape(b, q, h, g), 1, 2)
    lse = jnp.moveaxis(outputs.lse.reshape(b, h, g, q), 2, 3)
    is_illegal = mask.is_illegal(operands, q)
    if is_illegal is not None:
        # NaN is put into the gradients and not left to the LSE's: of exp(x - where(p, NaN, y)) XLA
        # for CPUs (JAX 0.10.2) may write nothing.
        is_illegal = problem.by_group(is_illegal[..., None])[..., 0]
        lse = jnp.where(is_illegal, 0, lse)
    dsinks = None
    if sinks is not None:
        dsinks = score.sink_gradient(problem.sinks, lse, delta)
        if is_illegal is not None:
            dsinks = jnp.where(is_illegal, jnp.nan, dsinks)
        dsinks = _sum_to(dsinks[..., None], (*sinks.shape, 1, 1))[..., 0, 0]
    lse = _finite_or_zero(lse)

    captured = {}  # the arrays whose gradients a score function gives
    if options.functions is not None:
        captured = differentiable.captured

    def step(carry, start):
        dquery, dbias, dcaptured = carry
        block = problem.block(start)
        scores, pull_back = problem.scores_to_pull_back(rows, block, captured)
        probs = jnp.exp(scores - lse[..., None])
        dprobs = _dot("bqhge,bkhe->bhqgk", dout, block.operands.value)
        dlogits = score.before_cap(options, probs * (dprobs - delta[..., None]), scores)
        unit = _unit(dout, block.operands.value, delta)
        if pull_back is not None:
            dlogits, of_captured = pull_back(dlogits)
            dcaptured = jax.tree.map(lambda x, y: x + y.astype(x.dtype), dcaptured, of_captured)
            if query.dtype == jnp.float16:  # the function's slope may be any number
                unit = _power_of_two(jnp.abs(dlogits).max((1, 2, 3, 4), keepdims=True))
        dscores = (dlogits / unit).astype(query.dtype)
        dquery += unit * _dot("bhqgk,bkhd->bhqgd", dscores, block.operands.key)
        unit = options.scale * jnp.reshape(unit, (-1, 1, 1, 1))
        dkey = unit * _dot("bhqgk,bqhgd->bkhd", dscores, rows)
        dvalue = _dot("bhqgk,bqhge->bkhe", probs.astype(dout.dtype), dout)
        if wants_dbias:
            dbias = _with_block(dbias, _sum_to(dlogits, bias.shape), start)
        return (dquery, dbias, dcaptured), (dkey.astype(key.dtype), dvalue.astype(value.dtype))

    dbias = None
    if wants_dbias:
        dbias = _full(query, (*bias.shape[:3], problem.operands.bias.shape[3]), 0)
        dbias = dbias if bias.shape[-1] == 1 else dbias.astype(bias.dtype)
    dcaptured = {name: _full(query, x.shape, 0) for name, x in captured.items()}
    init = _full(query, (b, h, q, g, query.shape[-1]), 0), dbias, dcaptured
    (dquery, dbias, dcaptured), (dkey, dvalue) = problem.over_blocks(step, init)
    if is_illegal is not None:
        of_keys = is_illegal.any((2, 3))[:, None, :, None]
        dquery = jnp.where(is_illegal[..., None], jnp.nan, dquery)
        dkey, dvalue = (jnp.where(of_keys, jnp.nan, x) for x in (dkey, dvalue))
    dquery = jnp.moveaxis(options.scale * dquery, 1, 2).reshape(query.shape).astype(query.dtype)
    dkey, dvalue = problem.join_blocks(dkey, 1), problem.join_blocks(dvalue, 1)
    if wants_dbias:
        dbias = lax.slice_in_dim(dbias, 0, bias.shape[-1], axis=3).astype(bias.dtype)
    dcaptured = {name: x.astype(captured[name].dtype) for name, x in dcaptured.items()}
    return type(operands)(
        query=dquery, key=dkey, value=dvalue, bias=dbias, sinks=dsinks, **dcaptured
    )


class _Block(NamedTuple):
    start: jax.Array  # index of its first key
    operands: Operands  # with the block's keys; key and value are zero past the sequence's length


class _Problem:
    """One call's arrays, cut into key blocks; the last block is filled up with zero rows."""

    more_columns = 0  # of the sums, beyond those of value

    def __init__(self, options: AttentionOptions, operands: Operands):
        self.options = options
        self.batch, self.seqlen_q = operands.query.shape[:2]
        self.seqlen_k = operands.key.shape[1]
        self.num_heads_kv = operands.key.shape[2]
        self.num_blocks, self.block_size = _cut(operands.query, self.seqlen_k)
        is_row = mask.is_row(operands, self.seqlen_q)
        self.is_row = None if is_row is None else self.by_group(is_row[..., None])[..., 0]
        operands = mask.within_window(options, mask.within_sight(operands))
        self.operands = operands.map(self.for_each_sequence).map(self.filled)
        self.slopes = self.by_group(_with_ones(self.operands.alibi_slopes))
        sinks = self.by_group(_with_ones(self.operands.sinks))
        self.sinks = None if sinks is None else sinks[..., 0]  # [b | 1, h, 1, g]

    def for_each_sequence(self, row, x):
        """`x` with a plane of its own for each sequence, unless all share one."""
        batch = self.batch
        if not row.shared or x.shape[0] in (1, batch):
            return x
        return jnp.repeat(x, batch // x.shape[0], axis=0)

    def filled(self, row, x):
        """`x` with whole blocks along the keys, if it has any."""
        axis = row.axis("t")
        return x if axis is None else self.fill(x, axis)

    def fill(self, x, axis):
        """`x` with whole blocks along the key axis `axis`; a broadcast axis stays as it is."""
        missing = self.num_blocks * self.block_size - self.seqlen_k
        if missing == 0 or x.shape[axis] != self.seqlen_k:
            return x
        return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

    def join_blocks(self, x, axis):
        """Undoes the cut: x [block, ...] with the block's keys on `axis` of the rest."""
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], self.num_blocks * self.block_size, *x.shape[axis + 2 :])
        return lax.slice_in_dim(x, 0, self.seqlen_k, axis=axis)

    def over_blocks(self, step, carry):
        """lax.scan of step(carry, first key) over the blocks; a single one needs no loop."""
        if isinstance(self.num_blocks, int) and self.num_blocks == 1:
            carry, results = step(carry, jnp.int32(0))
            return carry, jax.tree.map(lambda x: x[None], results)
        return lax.scan(step, carry, self.block_size * jnp.arange(self.num_blocks, dtype=jnp.int32))

    def query_heads(self, x):
        """[b, q, h * g, ...] -> [b, q, h, g, ...]."""
        group = x.shape[2] // self.num_heads_kv
        return x.reshape(*x.shape[:2], self.num_heads_kv, group, *x.shape[3:])

    def rows(self):
        return self.query_heads(self.zero_past_length(self.operands.query))

    def zero_past_length(self, x):
        """x [b, q, ...] with zeros past the query length: whatever stands there reaches nothing."""
        lengths = self.operands.query_lengths
        if lengths is None:
            return x
        inside = mask.inside(lengths, self.seqlen_q)
        return jnp.where(inside.reshape(*inside.shape, *(1,) * (x.ndim - 2)), x, 0)

    def block(self, start) -> _Block:
        def of_block(row, x):
            axis = row.axis("t")
            if axis is None or (row.form == "broadcast" and x.shape[axis] == 1):
                return x
            return lax.dynamic_slice_in_dim(x, start, self.block_size, axis)

        operands = self.operands.map(of_block)
        if operands.key_lengths is None:
            return _Block(start, operands)
        inside = mask.inside(operands.key_lengths, self.block_size, start)
        key, value = (
            jnp.where(inside[..., None, None], x, 0) for x in (operands.key, operands.value)
        )
        return _Block(start, operands.replace(key=key, value=value))

    def scales(self, start):
        """What products of rows and a block's keys are to be multiplied by."""
        return (self.options.scale,)

    def weigh(self, probs, block: _Block):
        """probs @ value, [b, h, q, g, e]."""
        value = block.operands.value
        return _dot("bhqgk,bkhe->bhqge", probs.astype(value.dtype), value)

    def normalize(self, acc, row_sum):
        """The output of the sums of weighed values, [b, h, q, g, e]."""
        return acc / row_sum[..., None]

    def scores(self, rows, block: _Block):
        """Scores of all rows against one block; -inf where a row sees no key."""
        return self.hide(self.changed(self.given_scores(rows, block), block), block)

    def scores_to_pull_back(self, rows, block: _Block, captured):
        """scores(rows, block), and the function that makes, of their gradients, those before a
        score function changed them and those of these captured arrays; None where there is none.
        """
        given = self.given_scores(rows, block)
        if self.options.functions is None or self.options.functions.score is None:
            return self.hide(given, block), None
        scores, pull_back = jax.vjp(
            lambda scores, captured: self.changed(scores, block, captured), given, captured
        )
        scores = self.hide(scores, block)

        def before_change(dscores):
            dgiven, dcaptured = pull_back(dscores)
            # The slope of what is hidden may be NaN.
            return jnp.where(scores == -jnp.inf, 0, dgiven), dcaptured

        return scores, before_change

    def given_scores(self, rows, block: _Block):
        """Scores before a score function changes them, and before any mask."""
        products = _dot("bqhgd,bkhd->bhqgk", rows, block.operands.key)
        terms = self.by_group(block.operands.bias), self.alibi(block)
        return score.scores(self.options, products, self.scales(block.start), terms)

    def changed(self, scores, block: _Block, captured=None):
        """Scores as a score function changes them, with these arrays in place of those of their
        names; a key that fills the last block up has the number of the last one."""
        operands = block.operands.replace(**captured or {})
        row, column = self.numbers(block)
        column = jnp.minimum(column, self.seqlen_k - 1)
        return score.changed(self.options, operands, scores, row, column)

    def hide(self, scores, block: _Block):
        """Scores with -inf where a row sees no key."""
        visible = self.by_group(self.visible(block))
        return scores if visible is None else jnp.where(visible, scores, -jnp.inf)

    def visible(self, block: _Block):
        """[b | 1, h * g | 1, q | 1, k | 1]; None where every row sees every key."""
        row, column = self.numbers(block)
        visible = mask.visible(self.options, block.operands, row, column)
        if self.num_blocks * self.block_size == self.seqlen_k:
            return visible
        inside = (column < self.seqlen_k).reshape(1, 1, 1, -1)
        return inside if visible is None else visible & inside

    def numbers(self, block: _Block):
        """int32 [q] and [k]: the numbers of all rows, and of the block's keys."""
        row = jnp.arange(self.seqlen_q, dtype=jnp.int32)
        return row, block.start + jnp.arange(self.block_size, dtype=jnp.int32)

    def alibi(self, block: _Block):
        """[b | 1, h, q, g, k], or None."""
        row, column = self.numbers(block)
        position = self.by_group(mask.positions(self.options, self.operands, row))
        return score.alibi(self.slopes, position, column.reshape(1, 1, 1, 1, -1))

    def by_group(self, x):
        """[b | 1, h * g | 1, q | 1, k | 1] -> [b | 1, h | 1, q | 1, g | 1, k | 1]."""
        if x is None:
            return None
        b, heads, q, k = x.shape
        h = self.num_heads_kv if heads > 1 else 1
        return jnp.moveaxis(x.reshape(b, h, heads // h, q, k), 2, 3)


class _Float8Problem(_Problem):
    """A forward problem in float8: products of float8 numbers, summed in float32, times scales.

    float8 goes into products as bfloat16, which holds it exactly and which any platform has.
    Probabilities, at most 1, use the upper half of float8's range. They weigh one more column, of
    ones: its sum is that of the probabilities as they were rounded.
    """

    more_columns = 1

    def __init__(self, options: AttentionOptions, operands: Operands):
        if operands.prepared_value is not None:
            value = rounding.restore_value(operands.prepared_value, operands.key.shape[1])
            operands = operands.replace(value=value, prepared_value=None)
        super().__init__(options, operands)
        by_row = rounding.by_row(operands.query_descale, self.seqlen_q)
        by_row = jnp.moveaxis(self.query_heads(by_row), 1, 2)  # [b, h, q, g]
        self.query_scale = options.scale * by_row[..., None]
        by_column = self.fill(rounding.by_row(operands.key_descale, self.seqlen_k), 1)
        self.key_scale = jnp.moveaxis(by_column, 1, 2)[:, :, None, None]  # [b, h, 1, 1, k | 1]
        self.value_scale = operands.value_descale[:, :, None, None, None]

    def rows(self):
        return super().rows().astype(jnp.bfloat16)

    def block(self, start) -> _Block:
        start, operands = super().block(start)
        key, value = (x.astype(jnp.bfloat16) for x in (operands.key, operands.value))
        return _Block(start, operands.replace(key=key, value=value))

    def scales(self, start):
        key_scale = self.key_scale
        if key_scale.shape[-1] > 1:
            key_scale = lax.dynamic_slice_in_dim(key_scale, start, self.block_size, -1)
        return self.query_scale, key_scale

    def weigh(self, probs, block: _Block):
        probs = (probs * PROBS_SCALE).astype(FLOAT8).astype(jnp.bfloat16)
        value = block.operands.value
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
        return _dot("bhqgk,bkhe->bhqge", probs, value)

    def normalize(self, acc, row_sum):
        divisor = acc[..., -1:]
        return acc[..., :-1] / jnp.where(divisor == 0, 1, divisor) * self.value_scale


def _cut(query, seqlen_k: int) -> tuple[int, int]:
    """(number of key blocks, key rows of a block), both at least 1. Where the number of keys is a
    symbol, blocks are small, because a short sequence is filled up to one."""
    if not isinstance(seqlen_k, int):
        return -(-seqlen_k // MIN_BLOCK), MIN_BLOCK
    known = [n for n in query.shape[:3] if isinstance(n, int)]
    rows = math.prod(known)
    if len(known) == 3 and rows * seqlen_k <= SCORES_AT_ONCE:
        return 1, max(seqlen_k, 1)
    largest = min(max(SCORES_PER_BLOCK // max(rows, 1), MIN_BLOCK), MAX_BLOCK)
    num_blocks = max(-(-seqlen_k // largest), 1)
    size = max(-(-seqlen_k // num_blocks), 1)
    return num_blocks, size if num_blocks == 1 else -(-size // 8) * 8


def _unit(dout, value, delta):
    """A power of two, [b, 1, 1, 1, 1], that dS is measured in: in float16, where dS may be larger
    than all gradients, what brings it near the end of the range; otherwise 1."""
    if dout.dtype != jnp.float16:
        return 1.0

    def norm(x):
        squares = jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True)
        return jnp.sqrt(squares.max(tuple(range(1, x.ndim)))).reshape(-1, 1, 1, 1, 1)

    return _power_of_two(norm(dout) * norm(value) + norm(delta[..., None]))


def _power_of_two(largest):
    """What brings numbers of at most `largest`, about, near the end of float16's range."""
    largest = lax.stop_gradient(largest)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -100) - 15)


def _sum_to(x, shape: tuple[int, ...]):
    """x [b, h, q, g, k], summed over the dimensions in which an array of this shape broadcasts, and
    over the sequences that share a plane."""
    b, h, q, g, k = x.shape
    full = jnp.moveaxis(x, 3, 2).reshape(b, h * g, q, k)
    if shape[0] not in (1, b):
        full = full.reshape(shape[0], -1, *full.shape[1:]).sum(1)
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    return full.sum(axes, keepdims=True)


def _with_ones(x):
    """[b, heads] -> [b, heads, 1, 1]."""
    return None if x is None else x[..., None, None]


def _with_block(dbias, block, start):
    """dbias with the part of one block, in place; a sum where the bias broadcasts over the keys."""
    if dbias.shape[3] == 1:
        return dbias + block
    return lax.dynamic_update_slice_in_dim(dbias, block.astype(dbias.dtype), start, 3)


def _dot(subscripts: str, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _finite_or_zero(x):
    """x with 0 in place of -inf: what an empty row's scores are measured from."""
    return jnp.where(x == -jnp.inf, 0, x)


def _full(like, shape, fill):
    """A float32 constant that varies over the same manual mesh axes as `like`, as scan needs."""
    constant = jnp.full(shape, fill, jnp.float32)
    axes = jax.typeof(like).manual_axis_type.varying
    return lax.pcast(constant, tuple(axes), to="varying") if axes else constant
