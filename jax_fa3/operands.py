"""The arrays of one call: a pytree with one row for each array.

A row says what is known about an array, and everything that happens to it on its way follows from
the row: its checks, its place in the custom calls, how jax.vmap folds it, which dimensions a mesh
splits, and what becomes of it where a sequence is divided.

Dimensions have letters: b batch, s query rows, t key rows, h query heads, k key/value heads,
d head_dim, e head_dim of value, m and n the blocks of query and key rows that share a scale, p the
keys of a prepared value, v the words of a table of visibility, u those of a dense mask's table,
c the ends of documents. A dot is a dimension of extent 1 that broadcasts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from jax_fa3.options import FLOAT8, AttentionOptions, dense_mask_words, num_blocks, padded_keys
from jax_fa3.visibility.layout import Layout

DTYPES = ("bfloat16", "float16", "float32")
FLOAT8_INPUTS = f"{FLOAT8} inputs"
ANY_SEQUENCE = "b"  # one value for each sequence

# How the shape of a public argument may differ from the row's dimensions (3-D inputs: without b).
#   exact      not at all
#   scalar     or one number for all
#   broadcast  any dimension may have extent 1, leading ones may be missing
#   blocks     scales: one for all, one a head, one a block of a head
#   heads      one for each head, whatever the batch; other floating dtypes are cast
Form = Literal["exact", "scalar", "broadcast", "blocks", "heads"]

# What an integer array's values count, from the start of the sequence. Where a device works on a
# part of the sequence, they are counted from the start of that part.
#   queries, keys   positions among the rows, as lengths and ends of intervals are
#   diagonal        the distance from a query row to its key
Counts = Literal["queries", "keys", "diagonal"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known about one array."""

    dims: str
    dtypes: tuple[str, ...]
    argument: str = ""  # its public name, where that is not the field's
    form: Form = "exact"
    counts: Counts | None = None
    differentiable: bool = False
    dear: bool = False  # its gradient is made only where it is asked for
    hides: bool = False  # its values, which no plan knows, say which keys rows see
    variant: str = "plain"  # of the kernels that a call with it takes (src/call/types.h)
    needs_whole: str | None = None  # what to call it where sequences cannot stay divided with it
    identifies: bool = False  # its values are ids, of which only equality or order matters
    shared: bool = False  # its batch may divide the call's: planes serve several sequences

    def sizes(self, extents: Extents) -> tuple[int, ...]:
        """The array's shape in a call of these extents."""
        return tuple(map(extents.by_letter().__getitem__, self.dims))

    @property
    def broadcasts(self) -> bool:
        """Whether dimensions of the array may have extent 1 in place of the call's."""
        return self.form in ("broadcast", "heads")

    def axis(self, letters: str) -> int | None:
        """The first dimension that has one of these letters."""
        return next((i for i, letter in enumerate(self.dims) if letter in letters), None)

    @property
    def splits(self) -> Literal["queries", "keys"] | None:
        """Whether the array is divided with the query rows, with the key rows, or not at all."""
        return "queries" if "s" in self.dims else "keys" if "t" in self.dims else None


def row(dims: str, *dtypes: str, **facts: Any) -> Any:
    """A field of Operands: an array, or None where the call has none."""
    return dataclasses.field(default=None, metadata={"row": Row(dims, dtypes, **facts)})


class Extents(NamedTuple):
    """The sizes of one call, of the dimensions b, s, t, h, k, d and e."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int

    @classmethod
    def of(cls, query: Any, key: Any, head_dim_v: int) -> Extents:
        """Of arrays or their types, with or without a batch dimension."""
        batch = query.shape[0] if query.ndim == 4 else 1
        seqlen_q, num_heads_q, head_dim = query.shape[-3:]
        seqlen_k, num_heads_kv = key.shape[-3:-1]
        return cls(batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v)

    @property
    def are_static(self) -> bool:
        """Whether all of them are numbers."""
        return set(map(type, self)) == {int}

    @property
    def have_static_lengths(self) -> bool:
        """Whether the sequence lengths are numbers."""
        return {type(self.seqlen_q), type(self.seqlen_k)} == {int}

    def by_letter(self) -> dict[str, int]:
        return dict(
            b=self.batch,
            s=self.seqlen_q,
            t=self.seqlen_k,
            h=self.num_heads_q,
            k=self.num_heads_kv,
            d=self.head_dim,
            e=self.head_dim_v,
            m=num_blocks(self.seqlen_q),
            n=num_blocks(self.seqlen_k),
            p=padded_keys(self.seqlen_k),
            v=Layout.of(self.seqlen_q, self.seqlen_k).words,
            u=dense_mask_words(self.seqlen_q, self.seqlen_k),
        )


class Bundle:
    """Arrays by name, each with a row; a subclass is a dataclass of `row` fields.

    The fields stand in the order of the custom calls' operands.
    """

    @classmethod
    @functools.cache
    def rows(cls) -> dict[str, Row]:
        return {field.name: field.metadata["row"] for field in dataclasses.fields(cls)}

    def present(self) -> dict[str, Array]:
        """The arrays that are there, in the order in which jax.tree flattens them."""
        arrays = vars(self)
        return {name: arrays[name] for name in self.rows() if arrays[name] is not None}

    def by_argument(self) -> dict[str, Array]:
        """The arrays that are there by their public names, as custom calls have them."""
        rows = self.rows()
        return {rows[name].argument or name: x for name, x in self.present().items()}

    def dims(self) -> tuple[str, ...]:
        """The dimensions of the arrays that are there."""
        return tuple(_dims(self.rows()[name], x) for name, x in self.present().items())

    def replace(self, **arrays: Array | None) -> Self:
        return dataclasses.replace(self, **arrays)

    def only(self, names: Any) -> Self:
        """These arrays, as far as they are there."""
        return type(self)(**{name: x for name, x in self.present().items() if name in names})

    def map(self, function: Callable[..., Any], *others: Bundle) -> Self:
        """function(row, array, *what others have in its place) in place of each array."""
        rows = self.rows()
        mapped = {
            name: function(rows[name], x, *(getattr(other, name) for other in others))
            for name, x in self.present().items()
        }
        return type(self)(**mapped)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Operands(Bundle):
    """The arrays that a call is given.

    A prepared value stands in a field of its own, because its dimensions are others; then `value`
    is absent. float8 arrays have all three descales, others have none. `dense_mask` is the table
    that the kernels take for `mask`, made next to them (ffi.py).
    """

    query: Array | None = row("bshd", *DTYPES, FLOAT8, differentiable=True)
    key: Array | None = row("btkd", *DTYPES, FLOAT8, differentiable=True)
    value: Array | None = row("btke", *DTYPES, FLOAT8, differentiable=True)
    prepared_value: Array | None = row("bkep", FLOAT8, needs_whole=FLOAT8_INPUTS)
    query_descale: Array | None = row("bhm", "float32", form="blocks", needs_whole=FLOAT8_INPUTS)
    key_descale: Array | None = row("bkn", "float32", form="blocks", needs_whole=FLOAT8_INPUTS)
    value_descale: Array | None = row("bk", "float32", form="blocks", needs_whole=FLOAT8_INPUTS)
    query_lengths: Array | None = row("b", "int32", argument="query_seq_lengths", counts="queries")
    key_lengths: Array | None = row("b", "int32", argument="key_value_seq_lengths", counts="keys")
    query_offset: Array | None = row("b", "int32", form="scalar", counts="diagonal")
    visibility: Array | None = row("bhv", "int32", form="broadcast", hides=True)
    bias: Array | None = row(
        "bhst",
        *DTYPES,
        form="broadcast",
        differentiable=True,
        dear=True,
        variant="bias",
        needs_whole="a bias or mask",
        shared=True,
    )
    mask: Array | None = row(
        "bhst",
        "bool",
        form="broadcast",
        hides=True,
        variant="mask",
        needs_whole="a bias or mask",
        shared=True,
    )
    dense_mask: Array | None = row("bhu", "int32", form="broadcast", shared=True)
    sinks: Array | None = row("bh", "float32", form="heads", differentiable=True, shared=True)
    alibi_slopes: Array | None = row("bh", "float32", form="heads", variant="alibi", shared=True)

    @property
    def extents(self) -> Extents:
        prepared = self.prepared_value
        head_dim_v = self.value.shape[3] if prepared is None else prepared.shape[2]
        return Extents.of(self.query, self.key, head_dim_v)

    @property
    def is_batched(self) -> bool:
        """Whether arrays of the user's shapes have a batch dimension."""
        return self.query.ndim == 4

    @property
    def is_float8(self) -> bool:
        return self.query_descale is not None

    def differentiable(self, options: AttentionOptions) -> Self:
        """The arrays whose gradient is wanted, which also has this form."""
        wanted, rows = options.dear_gradients, self.rows()
        all_wanted = {name for name, row in rows.items() if row.differentiable}
        if wanted is not None:
            all_wanted -= {name for name, row in rows.items() if row.dear} - set(wanted)
        return self.only(all_wanted)

    def needs_whole(self) -> str | None:
        """Which of the arrays need whole sequences."""
        found = (self.rows()[name].needs_whole for name in self.present())
        return next(filter(None, found), None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Outputs(Bundle):
    """What a call gives, and the cotangents of that; the LSE in natural log units, and of each head
    the largest logit, which has no cotangent."""

    out: Array | None = row("bshe", *DTYPES)
    lse: Array | None = row("bhs", "float32")
    max_logits: Array | None = row("bh", "float32")

    @classmethod
    def of_operations(cls, options: AttentionOptions) -> dict[str, str]:
        """The dimensions of what the operations give in a call of these options."""
        dims = {name: row.dims for name, row in cls.rows().items()}
        if not options.return_max_logits:
            del dims["max_logits"]
        return dims


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sources(Bundle):
    """The arrays of which a table of visibility is made; `cu_seqlens` come together."""

    query_segment_ids: Array | None = row("bs", "int32", identifies=True)
    key_value_segment_ids: Array | None = row("bt", "int32", identifies=True)
    kv_start: Array | None = row("bhs", "int32")
    kv_end: Array | None = row("bhs", "int32")
    cu_seqlens_q: Array | None = row("bc", "int32")
    cu_seqlens_k: Array | None = row("bc", "int32")
    query_offset: Array | None = row("b", "int32")

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        """Those of the table; of arrays with their rows' dimensions."""
        arrays = list(self.present().values())
        heads = (x.shape[1] for x in arrays if x.ndim == len("bhs"))
        return arrays[0].shape[0], next(heads, 1)


def in_row_dims(operands: Operands) -> Operands:
    """Checked arrays of the user's shapes, with the dimensions of their rows; scales have them."""
    is_batched = operands.is_batched
    batch = operands.query.shape[0] if is_batched else 1

    def shaped(row, x):
        if row.form == "blocks" or not row.dims.startswith("b"):
            return x
        if row.form == "broadcast":
            return x.reshape((1,) * (len(row.dims) - x.ndim) + x.shape)
        if row.form == "heads":
            return x[None]
        if row.dims == ANY_SEQUENCE:
            return jnp.broadcast_to(x, (batch,))
        return x if is_batched else x[None]

    return operands.map(shaped)


def dims(*bundles: Bundle) -> tuple[str, ...]:
    """The dimensions of all arrays, in the order in which jax.tree flattens the bundles."""
    return sum((bundle.dims() for bundle in bundles), ())


def _dims(row: Row, x: Array) -> str:
    if not row.broadcasts:
        return row.dims
    return "".join("." if n == 1 else letter for letter, n in zip(row.dims, x.shape, strict=True))
