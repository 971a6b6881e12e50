"""The arguments of the public call as one record.

The names stand here once. Whatever takes a call (its checks, the choice of a route, the doctor,
attention over a divided sequence) takes the record; tests compare the typed public signatures with
it. From it come the two things that the layers below know: static options and arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa3 import score
from jax_fa3.operands import Extents, Operands, Sources
from jax_fa3.options import (
    FLOAT8,
    AttentionOptions,
    SequenceParallel,
    resolve_deterministic,
    resolve_window,
)
from jax_fa3.values import (
    argument,
    check_choice,
    check_flag,
    check_implementation,
    check_offset,
    check_scale,
    check_sm_margin,
    check_soft_cap,
    check_window,
    is_array,
    or_none,
)

NO_ID = -1  # what no row may have for an id


class Division(NamedTuple):
    """Into how many equal parts the sequences are divided of which a call's arrays have one, and
    what makes whole ones of an array whose last dimension has rows or keys."""

    parts: int = 1
    gather: Callable[[Any], Any] = lambda x: x


UNDIVIDED = Division()


@dataclasses.dataclass(frozen=True, eq=False)
class Arguments:
    """Those of `jax_fa3.dot_product_attention`, as they were given. Arrays, and what goes together,
    are checked in validate.py."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    scale: Any = argument(check_scale)
    is_causal: Any = argument(check_flag, False)
    query_seq_lengths: Any = None
    key_value_seq_lengths: Any = None
    local_window_size: Any = argument(check_window)
    implementation: Any = argument(check_implementation)
    return_residual: Any = argument(check_flag, False)
    query_offset: Any = argument(check_offset)
    deterministic: Any = argument(or_none(check_flag))
    sequence_parallel: Any = argument(partial(check_choice, get_args(SequenceParallel)), "auto")
    sm_margin: Any = argument(check_sm_margin, 0)
    forward_dtype: Any = None
    query_descale: Any = None
    key_descale: Any = None
    value_descale: Any = None
    value_is_prepared: Any = argument(check_flag, False)
    query_segment_ids: Any = None
    key_value_segment_ids: Any = None
    kv_start: Any = None
    kv_end: Any = None
    attention_chunk: Any = None
    visibility: Any = None
    logits_soft_cap: Any = argument(check_soft_cap)
    alibi_slopes: Any = None
    sinks: Any = None
    return_max_logits: Any = argument(check_flag, False)

    # What the record becomes.
    Options: ClassVar[type[AttentionOptions]] = AttentionOptions
    Operands: ClassVar[type[Operands]] = Operands

    function: ClassVar[str] = "dot_product_attention"  # the public one

    @property
    def has_functions(self) -> bool:
        """Whether functions of the user change scores or hide pairs."""
        return False

    def why_no_function_kernel(self) -> str | None:
        """What of its functions no kernel takes."""
        return None

    def why_not_linked(self) -> str | None:
        """Why no kernel can be linked with its functions here."""
        return None

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """The array arguments that are given, by their fields of Operands; of a table of visibility
        the type of one, since it is yet to be made or brought to the call's heads."""
        found = {}
        for name, row in self.Operands.rows().items():
            if name == "visibility":
                x = self._type_of_visibility()
            else:
                x = getattr(self, row.argument or name, None)
            is_number = row.form == "scalar" and not is_array(x)
            if x is not None and not is_number:
                found[name] = x
        if self.value_is_prepared:
            found["prepared_value"] = found.pop("value")
        return found

    @functools.cached_property
    def sources(self) -> dict[str, Any]:
        """The arrays of which a table of visibility is to be made, by their names; none where the
        call has no such table or was given one."""
        known = {field.name for field in dataclasses.fields(self)}
        found = {name: getattr(self, name) for name in Sources.rows() if name in known}
        offset = found.pop("query_offset")
        found = {name: x for name, x in found.items() if x is not None}
        if self.attention_chunk is not None and is_array(offset):
            found["query_offset"] = offset
        return found

    @property
    def makes_visibility(self) -> bool:
        """Whether a table of visibility is to be made for the call."""
        return bool(self.sources) or self.attention_chunk is not None

    @property
    def source_of_visibility(self) -> str:
        """The first argument of which a table of visibility is to be made, where one is."""
        return next((name for name in self.sources if name != "query_offset"), "attention_chunk")

    @property
    def needs_whole(self) -> str | None:
        """The first argument given with which sequences cannot stay divided."""
        rows = self.Operands.rows().items()
        names = [row.argument or name for name, row in rows if row.needs_whole]
        return next((name for name in names if getattr(self, name, None) is not None), None)

    def _type_of_visibility(self) -> jax.ShapeDtypeStruct | None:
        if not self.makes_visibility and self.visibility is None:
            return None
        words = self.extents.by_letter()["v"]
        return jax.ShapeDtypeStruct((1, 1, words), jnp.int32)

    def with_arrays(self) -> Self:
        """Whatever may stand for an array, such as a list, made one."""
        of_keys = ids_of_keys(self.query_segment_ids, self.key_value_segment_ids)
        if of_keys is not self.key_value_segment_ids:
            return dataclasses.replace(self, key_value_segment_ids=of_keys).with_arrays()
        given = {name: getattr(self, name) for name in self._array_names()}
        made = {name: as_array(name, x) for name, x in given.items() if not _is_typed(x)}
        counts = {name: getattr(self, name) for name in self._count_names()}
        counts = {name: x for name, x in counts.items() if name in made or is_int64(x)}
        made |= {name: as_indices(name, x) for name, x in counts.items()}
        by_head = {name: made.get(name, getattr(self, name)) for name in self._head_names()}
        made |= {name: as_float32(x) for name, x in by_head.items() if is_other_float(x)}
        return dataclasses.replace(self, **made) if made else self

    @functools.cached_property
    def dtype(self) -> str:
        """The name of query's dtype."""
        return dtype_name(self.query)

    @property
    def is_float8(self) -> bool:
        return self.dtype == FLOAT8

    @functools.cached_property
    def plain_value(self) -> Any:
        """`value`, or the type that it had before it was prepared."""
        if not self.value_is_prepared:
            return self.value
        shape = (*self.key.shape[:-1], self.value.shape[-2])
        return jax.ShapeDtypeStruct(shape, self.value.dtype)

    @functools.cached_property
    def extents(self) -> Extents:
        return Extents.of(self.query, self.key, self.plain_value.shape[-1])

    def options(self) -> AttentionOptions:
        """The static choices of checked arguments; options of the same name are passed on."""
        passed = {name: _plain(getattr(self, name)) for name in self._passed()}
        left, right = resolve_window(self.local_window_size, self.is_causal)
        offset = self.query_offset
        resolved = dict(
            scale=abs(score.resolve_scale(self.scale, self.query.shape[-1])) or 1.0,
            window_left=left,
            window_right=right,
            query_offset=0 if offset is None or is_array(offset) else int(offset),
            deterministic=resolve_deterministic(self.deterministic),
            softcap=float(np.float32(self.logits_soft_cap or 0)),
            sm_margin=int(self.sm_margin),
            forward_dtype=None if self.forward_dtype is None else FLOAT8,
            out_dtype="bfloat16" if self.is_float8 else None,
        )
        return self.Options(**passed | resolved)

    @classmethod
    @functools.cache
    def _array_names(cls) -> tuple[str, ...]:
        """The names of arguments that are always arrays."""
        known = {field.name for field in dataclasses.fields(cls)}
        rows = cls.Operands.rows().items()
        names = [row.argument or name for name, row in rows if row.form != "scalar"]
        names = [name for name in names if name != "visibility"]
        names += [name for name in Sources.rows() if name != "query_offset"]
        return tuple(name for name in names if name in known)

    @classmethod
    @functools.cache
    def _count_names(cls) -> tuple[str, ...]:
        """The names of arguments whose arrays count rows, or documents."""
        known = {field.name for field in dataclasses.fields(cls)}
        rows = cls.Operands.rows().items()
        names = [row.argument or name for name, row in rows if row.counts]
        names += [name for name in Sources.rows() if name not in names]
        return tuple(name for name in names if name in known)

    @classmethod
    @functools.cache
    def _head_names(cls) -> tuple[str, ...]:
        """The names of arguments whose arrays have a number for each head."""
        rows = cls.Operands.rows().items()
        return tuple(row.argument or name for name, row in rows if row.form == "heads")

    @classmethod
    @functools.cache
    def _passed(cls) -> tuple[str, ...]:
        """The names that arguments and options have in common."""
        known = {field.name for field in dataclasses.fields(cls.Options)}
        return tuple(field.name for field in dataclasses.fields(cls) if field.name in known)


def dtype_name(x: Any) -> str:
    return _name_of(x.dtype)


@functools.cache  # NumPy puts names together anew each time
def _name_of(dtype: np.dtype) -> str:
    return dtype.name


def as_array(name: str, x: Any) -> jax.Array | np.ndarray:
    try:
        # NumPy keeps the integers of a list whole, which JAX would cut to 32 bits or refuse.
        return np.asarray(x, np.int64) if _is_ints(x) else jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} is a {type(x).__name__}; expected an array") from error


def ids_of_keys(ids: Any, of_keys: Any) -> Any:
    """None, where rows and keys are given the same array: what it says of the rows is enough, is
    found faster, and has fewer rules."""
    return None if of_keys is ids else of_keys


def as_indices(name: str, x: Any) -> Any:
    """An argument whose values are integers as an array, int32 if it was int64 or has no values."""
    if not is_array(x):
        x = as_array(name, x)
        x = x if x.size else np.asarray(x, np.int32)  # of [] alone the dtype is not known
    return as_int32(name, x) if is_int64(x) else x


def as_int32(name: str, x: Any) -> Any:
    """Of an int64 array, such as NumPy makes of Python integers. The values of a traced one are not
    known here: positions and lengths beyond int32 become its nearest number, which is as far behind
    all rows; ids, of which none may become another, a negative one, which breaks their rule."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.int32, sharding=x.sharding)
    limits = np.iinfo(np.int32)
    values = values_of(x)
    if values is not None:
        wrong = values[(values < limits.min) | (values > limits.max)]
        if wrong.size:
            raise ValueError(f"{name} has a value {wrong[0]}; expected values that fit int32")
        return x.astype(jnp.int32)
    fitting = jnp.clip(x, limits.min, limits.max)
    if name in Sources.rows() and Sources.rows()[name].identifies:
        fitting = jnp.where(fitting == x, x, NO_ID)
    return fitting.astype(jnp.int32)


def values_of(x: Any) -> np.ndarray | None:
    """The values of an array, where they are known here."""
    is_type = isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct))
    if is_type or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def as_float32(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
    return x.astype(jnp.float32)


def is_other_float(x: Any) -> bool:
    """Whether `x` is an array of a floating dtype that is cast to float32 where it must be that."""
    return is_array(x) and dtype_name(x) in ("bfloat16", "float16", "float64")


def is_int64(x: Any) -> bool:
    return is_array(x) and x.dtype == np.int64


def _is_ints(x: Any) -> bool:
    """Whether `x` is a list or tuple of Python integers."""
    return isinstance(x, (list, tuple)) and bool(x) and all(type(n) is int for n in x)


def _is_typed(x: Any) -> bool:
    """Whether `x` has a shape and a dtype, or is not there at all."""
    known = x is None or isinstance(x, (jax.Array, np.ndarray))
    return known or (hasattr(x, "shape") and hasattr(x, "dtype") and hasattr(x, "ndim"))


def _plain(x: Any) -> Any:
    """A NumPy number or bool as Python's, so that equal options are equal and hash alike."""
    return x.item() if isinstance(x, np.generic) else x
