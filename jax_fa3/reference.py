"""The meaning of attention, written out densely in float64 numpy: the oracle and the definition.

    scores[b, n, i, j] = scale * query[b, i, n] . key[b, j, n // group] + bias[b, n, i, j]
                         - alibi_slopes[n] * |i + offset - j|
    logits[b, n, i, j] = logits_soft_cap * tanh(scores[b, n, i, j] / logits_soft_cap)
    visible[b, n, i, j] = i < query_length and j < key_length and mask[b, n, i, j]
                          and i + offset - left <= j <= i + offset + right
                          and query_segment_ids[b, i] == key_value_segment_ids[b, j] != 0
                          and kv_start[b, n, i] <= j < kv_end[b, n, i]
                          and (i + offset) // attention_chunk == j // attention_chunk
    max_logits[b, n] = the largest logits[b, n, i, j] that is visible, -inf where none is
    lse[b, i, n] = log(sum over visible j of exp(logits) + exp(sinks[n])), the sink where row i is
                   no padding; -inf where there is nothing to sum
    out[b, i, n] = sum over visible j of exp(logits - lse) * value[b, j, n // group], likewise 0

Without a cap logits are the scores. Rows are padding from query_length on, and behind the last one
of their head that ids, starts, ends and chunks let see a key. Arrays are 4-D as in
dot_product_attention, of any dtype; results are float64. The batch of a bias or a mask may also
divide that of the call: then each plane serves as many sequences in a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jax_fa3.options import resolve_window


class Gradients(NamedTuple):
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    bias: np.ndarray | None
    sinks: np.ndarray | None


class Reference:
    """One call's probabilities, and from them `out`, `lse`, `max_logits` and any number of
    `gradients`."""

    def __init__(
        self,
        query,
        key,
        value,
        bias=None,
        mask=None,
        *,
        scale=None,
        is_causal=False,
        query_seq_lengths=None,
        key_value_seq_lengths=None,
        local_window_size=None,
        query_offset=None,
        query_segment_ids=None,
        key_value_segment_ids=None,
        kv_start=None,
        kv_end=None,
        attention_chunk=None,
        logits_soft_cap=None,
        alibi_slopes=None,
        sinks=None,
    ):
        query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
        batch, seqlen_q, num_heads_q, head_dim = query.shape
        seqlen_k, self.num_heads_kv = key.shape[1:3]
        self.scale = 1 / np.sqrt(head_dim) if scale is None else float(scale)
        self.rows = _inside(query_seq_lengths, batch, seqlen_q)  # [b, i]
        keys = _inside(key_value_seq_lengths, batch, seqlen_k)  # [b, j]

        same_document = True  # [b, i, j]
        if query_segment_ids is not None:
            own = np.asarray(query_segment_ids)
            other = own if key_value_segment_ids is None else np.asarray(key_value_segment_ids)
            same_document = own[..., None] == other[:, None]
            self.rows, keys = self.rows & (own != 0), keys & (other != 0)

        # Padding is replaced by zeros, whatever it holds; key and value heads are repeated.
        self.query = np.where(self.rows[..., None, None], query, 0)
        group = num_heads_q // self.num_heads_kv
        self.key, self.value = (
            np.repeat(np.where(keys[..., None, None], x, 0), group, axis=2) for x in (key, value)
        )

        left, right = resolve_window(local_window_size, is_causal)
        offset = np.broadcast_to(0 if query_offset is None else np.asarray(query_offset), (batch,))
        position = np.arange(seqlen_q) + offset[:, None].astype(np.int64)  # [b, i]
        distance = np.arange(seqlen_k) - position[..., None]  # [b, i, j]
        visible = self.rows[..., None] & keys[:, None] & (-left <= distance) & (distance <= right)
        told = np.broadcast_to(same_document, (batch, seqlen_q, seqlen_k))[:, None]
        if query_segment_ids is not None:
            told = told & (own != 0)[:, None, :, None]
        number = np.arange(seqlen_k)
        if kv_start is not None:
            told = told & (_by_head(kv_start, num_heads_q) <= number)
        if kv_end is not None:
            told = told & (number < _by_head(kv_end, num_heads_q))
        if attention_chunk is not None:
            chunk = position // attention_chunk
            told = told & (chunk[:, None, :, None] == number // attention_chunk)
        visible = visible[:, None] & told
        if mask is not None:
            visible = visible & _by_sequence(mask, batch)
        is_row = _inside(query_seq_lengths, batch, seqlen_q)[:, None]  # [b, n, i]
        arrays = (query_segment_ids, kv_start, kv_end, attention_chunk)
        if any(x is not None for x in arrays):
            sees = told.any(-1)[..., ::-1]
            is_row = is_row & np.logical_or.accumulate(sees, -1)[..., ::-1]

        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            logits = self.scale * np.einsum("bind,bjnd->bnij", self.query, self.key)
            if bias is not None:
                logits = logits + _by_sequence(bias, batch).astype(np.float64)
            if alibi_slopes is not None:
                slopes = np.asarray(alibi_slopes).astype(np.float64)
                logits = logits - slopes[:, None, None] * np.abs(distance)[:, None]
            self.cap_slope = 1.0  # of logits by scores
            if logits_soft_cap is not None:
                tanh = np.tanh(logits / logits_soft_cap)
                logits, self.cap_slope = logits_soft_cap * tanh, 1 - tanh**2
            logits = np.where(visible, logits, -np.inf)
            self.max_logits = logits.max((2, 3), initial=-np.inf)
            row_max = logits.max(-1, keepdims=True, initial=-np.inf)
            row_max = np.where(row_max == -np.inf, 0, row_max)
            lse = row_max[..., 0] + np.log(np.exp(logits - row_max).sum(-1))  # [b, n, i]
            self.sinks = None
            if sinks is not None:
                self.sinks = np.asarray(sinks).astype(np.float64)[:, None]  # [n, i]
                lse = np.where(is_row, np.logaddexp(lse, self.sinks), lse)
            finite_lse = np.where(lse == -np.inf, 0, lse)
            self.probs = np.exp(logits - finite_lse[..., None])
            self.out = np.einsum("bnij,bjnd->bind", self.probs, self.value)
        self.lse = lse.swapaxes(1, 2)
        self.bias_shape = None if bias is None else np.shape(bias)

    def gradients(self, dout, dlse=None) -> Gradients:
        """The cotangents of the inputs, given those of out (b, i, n, d) and lse (b, i, n)."""
        dout = np.where(self.rows[..., None, None], np.asarray(dout).astype(np.float64), 0)
        delta = np.einsum("bind,bind->bni", dout, self.out)
        if dlse is not None:
            has_lse = self.lse > -np.inf
            dlse = np.where(has_lse, np.asarray(dlse).astype(np.float64), 0)
            delta = delta - dlse.swapaxes(1, 2)
        dprobs = np.einsum("bind,bjnd->bnij", dout, self.value)
        dlogits = self.probs * (dprobs - delta[..., None]) * self.cap_slope
        dsinks = None
        if self.sinks is not None:
            lse = self.lse.swapaxes(1, 2)
            weight = np.exp(self.sinks - np.where(lse == -np.inf, np.inf, lse))
            dsinks = -(weight * delta).sum((0, 2))
        return Gradients(
            query=self.scale * np.einsum("bnij,bjnd->bind", dlogits, self.key),
            key=self.scale * self._sum_group(np.einsum("bnij,bind->bjnd", dlogits, self.query)),
            value=self._sum_group(np.einsum("bnij,bind->bjnd", self.probs, dout)),
            bias=None if self.bias_shape is None else _unbroadcast(dlogits, self.bias_shape),
            sinks=dsinks,
        )

    def _sum_group(self, x: np.ndarray) -> np.ndarray:
        """Sums the query heads of each key/value head."""
        batch, seqlen, num_heads, dim = x.shape
        group = num_heads // self.num_heads_kv
        return x.reshape(batch, seqlen, self.num_heads_kv, group, dim).sum(3)


def _inside(lengths, batch: int, seqlen: int) -> np.ndarray:
    """[b, seq]: which rows are not padding."""
    lengths = np.full(batch, seqlen) if lengths is None else np.asarray(lengths)
    return np.arange(seqlen) < lengths[:, None]


def _by_head(x, num_heads: int) -> np.ndarray:
    """[b, n or 1, i, 1] of an array [b, i], or [b, heads, i] for query heads or key/value heads."""
    x = np.asarray(x)
    x = x[:, None] if x.ndim == 2 else np.repeat(x, num_heads // x.shape[1], axis=1)
    return x[..., None]


def _by_sequence(x, batch: int) -> np.ndarray:
    """A bias or mask with a plane for each sequence, or one for all."""
    x = np.asarray(x)
    if x.ndim < 4 or x.shape[0] in (1, batch):
        return x
    return np.repeat(x, batch // x.shape[0], axis=0)


def _unbroadcast(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums x over the dimensions along which an array of `shape` was broadcast, and the sequences
    that shared a plane."""
    padded = (1,) * (x.ndim - len(shape)) + tuple(shape)
    if padded[0] not in (1, len(x)):
        x = x.reshape(padded[0], -1, *x.shape[1:]).sum(1)
    axes = tuple(i for i, n in enumerate(padded) if n == 1)
    return x.sum(axes, keepdims=True).reshape(shape)
