"""The public call of attention with score and mask functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fa3 import api
from jax_fa3.arguments import Arguments
from jax_fa3.flex import link
from jax_fa3.flex.block_mask import BLOCK_OF_KERNELS, BlockMask
from jax_fa3.flex.functions import Functions, trace
from jax_fa3.flex.operands import FlexOperands
from jax_fa3.flex.translate import Untranslatable
from jax_fa3.native import KERNEL_DTYPES
from jax_fa3.operands import DTYPES
from jax_fa3.options import AttentionOptions
from jax_fa3.validate import check_dtype
from jax_fa3.values import one_of, shape_of

DTYPE_OF_KERNELS = "bfloat16"


class Traced(NamedTuple):
    """A call's functions, and the arrays that they capture, given or closed over."""

    functions: Functions
    arrays: list[jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class FlexArguments(Arguments):
    """The arguments of `flex_attention`; arguments that it does not take keep their defaults."""

    score_mod: Any = None
    mask_mod: Any = None
    captured: Any = ()
    block_mask: Any = None

    function: ClassVar[str] = "flex_attention"

    @property
    def has_functions(self) -> bool:
        return self.score_mod is not None or self.mask_mod is not None

    @functools.cached_property
    def traced(self) -> Traced:
        """Its functions and all that they capture."""
        leaves, tree = _captured(self.captured)
        found, arrays = {}, list(leaves)
        for name in ("score_mod", "mask_mod"):
            function = getattr(self, name)
            if function is not None:
                made, closed_over = trace(name, function, tree.unflatten(leaves), len(arrays))
                found[name.removesuffix("_mod")] = made
                arrays += closed_over
        blocks = self.block_mask
        return Traced(
            Functions(**found, block=(0, 0) if blocks is None else blocks.block_size), arrays
        )

    def options(self) -> AttentionOptions:
        return dataclasses.replace(super().options(), functions=self.traced.functions)

    def why_no_function_kernel(self) -> str | None:
        functions, arrays = self.traced
        if self.dtype in KERNEL_DTYPES and self.dtype != DTYPE_OF_KERNELS:
            return f"the kernels take functions with {DTYPE_OF_KERNELS}, not {self.dtype}"
        if functions.has_blocks and any(n % BLOCK_OF_KERNELS for n in functions.block):
            return (
                f"the kernels take a block_mask whose blocks have multiples of {BLOCK_OF_KERNELS} "
                f"rows and keys, not {functions.block}"
            )
        try:
            link.translation(functions, arrays, self.extents)
        except Untranslatable as error:
            return str(error)
        return None

    def why_not_linked(self) -> str | None:
        return link.why_not()


def flex_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    captured: tuple[Any, ...] = (),
    *,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    return_residual: bool = False,
    implementation: Literal["fa3", "xla"] | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """softmax(score_mod(scale * query @ key^T)) @ value, where mask_mod lets a row see a key.

    Both functions are ordinary JAX functions of scalars. On Hopper GPUs bfloat16 runs on kernels
    that are linked with them when the program is compiled, which takes seconds for a new function;
    everything else runs through XLA, which maps them over all pairs, block by block. A call without
    functions is `dot_product_attention`. docs/flex.md has examples, and PyTorch's names.

    Letters: B batch, T query rows, S keys, N query heads, K key/value heads (a divisor of N),
    H head_dim.

    Args:
      query: (B, T, N, H) or (T, N, H); bfloat16, float16 or float32.
      key: (B, S, K, H) or (S, K, H), of query's dtype.
      value: (B, S, K, H) or (S, K, H), of query's dtype; its last dimension may differ from H, and
        the output then has the same last dimension.
      score_mod: `score_mod(score, batch, head, q_idx, kv_idx, *captured) -> score`. score is
        scale * q . k; score and result are float32 scalars, and -inf hides the pair. batch, head,
        q_idx and kv_idx are int32 scalars: the indices of sequence, query head, row and key. They
        count from 0 and do not depend on query_offset. 3-D inputs have batch 0.
      mask_mod: `mask_mod(batch, head, q_idx, kv_idx, *captured) -> bool`, True if the row may see
        the key. A row sees a key only if mask_mod and all other arguments allow it.
      captured: a tuple of arrays, or of pytrees of arrays, which both functions get. Arrays that a
        function closes over, traced ones too, are captured as well. Floating ones have gradients,
        which XLA makes. The kernels take functions that read at most 8 arrays.
      block_mask: the result of `create_block_mask` for mask_mod. mask_mod decides only the pairs of
        its partly visible blocks; hidden blocks stay hidden and full blocks stay visible.
      scale: a finite Python number that multiplies the scores; default 1 / sqrt(H).
      Others: is_causal, local_window_size, query_offset, query_seq_lengths, key_value_seq_lengths,
        kv_start, kv_end, query_segment_ids and key_value_segment_ids, as in
        `dot_product_attention`.
      return_residual: also return the log-sum-exp of each row's scores.
      implementation: None takes the kernels where they apply and logs once, with the reason,
        where they do not; "fa3" raises instead; "xla" forces XLA.

    Returns:
      out, (B, T, N, H) or (T, N, H), of query's dtype; with return_residual a tuple (out, lse), lse
      float32 (B, T, N) or (T, N), natural logarithm. A row that sees no key has out 0 and lse -inf.

    Raises:
      ValueError: shapes or values do not fit; the message names the argument, the value it got and
        the expected value.
      TypeError: a wrong dtype, or an array in place of a Python value.
      NotImplementedError: implementation="fa3" and the kernels cannot run the call; the message
        names the primitive of a function that they do not know, and its line. Also the gradient of
        a captured array, which it names.

    Example:
      >>> q = k = v = jax.random.normal(jax.random.key(0), (2, 256, 4, 64), jnp.bfloat16)
      >>> bias = lambda score, batch, head, q_idx, kv_idx: score + 0.1 * (kv_idx - q_idx)
      >>> jax_fa3.flex_attention(q, k, v, bias, jax_fa3.flex.causal_mask).shape
      (2, 256, 4, 64)

    Source: FlexAttention, arXiv:2412.05496.
    """
    arguments = FlexArguments(**locals())
    _check_companions(arguments)
    if arguments.has_functions:
        return _attention(arguments)
    names = {field.name for field in dataclasses.fields(Arguments)}
    return api.attention(Arguments(**{name: getattr(arguments, name) for name in names}))


def _check_companions(arguments: FlexArguments) -> None:
    """Raises for an argument that needs a function without that function."""
    if arguments.block_mask is not None and arguments.mask_mod is None:
        raise ValueError(
            "block_mask is given and mask_mod is None; expected the function that block_mask was "
            "made from: it decides the pairs of partly visible blocks"
        )
    if not isinstance(arguments.captured, (tuple, list)):
        raise TypeError(
            f"captured is a {type(arguments.captured).__name__}; expected a tuple: the arguments "
            "of the functions after kv_idx"
        )
    if arguments.captured and not arguments.has_functions:
        raise ValueError(
            "captured is given and score_mod and mask_mod are None; expected a function that takes "
            "captured arrays"
        )


def _attention(arguments: FlexArguments) -> jax.Array | tuple[jax.Array, ...]:
    arguments = arguments.with_arrays()
    for name in ("query", "key", "value"):
        if getattr(arguments, name) is not None:
            check_dtype(name, getattr(arguments, name), DTYPES)
    arguments = cast(FlexArguments, api.checked(arguments))
    _check_block_mask(arguments)
    options, operands = api.prepared(arguments)
    blocks = arguments.block_mask
    states = None if blocks is None else blocks.states
    operands = FlexOperands.of(operands, arguments.extents, arguments.traced.arrays, states)
    return api.public_results(api.fa3_attention(options, operands))


def _captured(captured: Any) -> tuple[list[jax.Array], Any]:
    """The captured arrays, and their tree structure."""
    leaves, tree = jax.tree.flatten(tuple(captured))
    arrays = []
    for i, x in enumerate(leaves):
        try:
            arrays.append(jnp.asarray(x))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"captured has a {type(x).__name__} as array {i}; expected arrays"
            ) from error
    return arrays, tree


def _check_block_mask(arguments: FlexArguments) -> None:
    """Raises unless block_mask is a BlockMask for the call's rows, keys, sequences and heads."""
    blocks, n = arguments.block_mask, arguments.extents
    if blocks is None:
        return
    if not isinstance(blocks, BlockMask):
        raise TypeError(
            f"block_mask is a {type(blocks).__name__}; expected the result of "
            "jax_fa3.create_block_mask"
        )
    if (blocks.q_len, blocks.kv_len) != (n.seqlen_q, n.seqlen_k):
        raise ValueError(
            f"block_mask is for {blocks.q_len} rows and {blocks.kv_len} keys; expected "
            f"{n.seqlen_q} and {n.seqlen_k} like query and key"
        )
    rows, keys = blocks.block_size
    of_blocks = -(-blocks.q_len // rows), -(-blocks.kv_len // keys)
    allowed = (1, n.batch), (1, n.num_heads_q), of_blocks[:1], of_blocks[1:]
    shape = blocks.states.shape
    if len(shape) != 4 or any(x not in some for x, some in zip(shape, allowed, strict=True)):
        expected = (one_of(tuple(map(str, dict.fromkeys(some)))) for some in allowed)
        raise ValueError(
            f"block_mask has states of shape {shape_of(blocks.states)}; expected "
            f"({', '.join(expected)})"
        )
