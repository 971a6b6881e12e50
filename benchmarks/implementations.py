"""The attention functions compared: jax_fa3 and its peers, by one table."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import util

import jax
import jax.numpy as jnp

import jax_fa3
from benchmarks.problems import QUICK_SEQLENS, Problem

Function = Callable[..., jax.Array]  # (query, key, value, and what is beside them) -> output


@dataclass(frozen=True)
class Implementation:
    """A column of the tables: build(problem, mode) gives the function to time."""

    name: str
    build: Callable[[Problem, str], Function]
    prescaled: bool = False  # applies no softmax scale: the query must carry it
    dtype: jnp.dtype | None = None  # the only one it takes
    seqlens: Container[int] = range(1 << 20)  # the sequence lengths it is timed at
    serial: bool = False  # compiled alone, because its compilation times kernels
    beside: Callable[[Problem], tuple] = lambda problem: ()  # its other arrays, made untimed
    package: str | None = None  # the one that it is left out without
    target: str | None = None  # the custom call that must come out of lowering, with {mode} in it
    tolerance: float = (
        2e-2  # relative, of a result in bf16; a wrong mask or a lost tile is far above
    )

    def prepare(self, problem: Problem, query, key, value) -> tuple[jax.Array, ...]:
        """Its inputs from the common ones, outside the timed region."""
        if self.prescaled:
            query = query.astype(jnp.float32) * problem.head_dim**-0.5
        return tuple(x.astype(self.dtype or problem.numpy_dtype) for x in (query, key, value))

    def expected(self, problem: Problem, gradients: tuple[jax.Array, ...]):
        """The gradients it should give: a prescaled query's lacks the scale."""
        dquery, dkey, dvalue = gradients
        return dquery * problem.head_dim**0.5 if self.prescaled else dquery, dkey, dvalue


def our_attention(attention: Function = jax_fa3.dot_product_attention) -> Function:
    """The kernels and nothing else on a GPU; without one, what lowering for CUDA picks."""
    implementation = "fa3" if jax.default_backend() == "gpu" else None
    return partial(attention, implementation=implementation)


def fa3(problem: Problem, mode: str) -> Function:
    return partial(our_attention(), **problem.masking())


def jax_nn(implementation: str, problem: Problem, mode: str) -> Function:
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    return partial(attend, **problem.masking())


def mosaic(problem: Problem, mode: str) -> Function:
    """Pallas Mosaic GPU's attention with block sizes that fit each head dimension."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    wide = problem.head_dim > 128
    config = dict(block_q=64, block_kv=64 if wide else 128, max_concurrent_steps=2)
    if mode == "backward":
        blocks = ("block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv")
        config |= dict.fromkeys(blocks, 64) | {"compute_wgs_bwd": 1 if wide else 2}
    tuning = attention_mgpu.TuningConfig(causal=problem.causal, **config)
    return lambda query, key, value: attention_mgpu.attention(query, key, value, tuning)


def upstream(problem: Problem, mode: str) -> Function:
    """FlashAttention-3's own kernels through XLA's FFI."""
    from dew_flash_attn import flash_mha

    return partial(flash_mha, is_causal=problem.causal)


def triton(problem: Problem, mode: str) -> Function:
    """Pallas Triton's attention, FlashAttention-2's algorithm, with block sizes that fit."""
    from jax.experimental.pallas.ops.gpu import attention

    block_q = 128 if problem.head_dim <= 128 else 64
    others = ("block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = attention.BlockSizes(block_q=block_q, **dict.fromkeys(others, 64))
    scale = problem.head_dim**-0.5
    return lambda query, key, value: attention.mha(
        query, key, value, None, sm_scale=scale, causal=problem.causal, block_sizes=sizes
    )


def tokamax(implementation: str, problem: Problem, mode: str) -> Function:
    """Tokamax's own choice of block sizes."""
    from absl import flags
    from tokamax import dot_product_attention

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or else it reads the benchmark's command line
    return partial(dot_product_attention, implementation=implementation, **problem.masking())


def available(implementations: Iterable[Implementation], log: Callable) -> list[Implementation]:
    """Those whose packages are installed; `log` is told which are not."""
    found = []
    for x in implementations:
        if x.package and util.find_spec(x.package) is None:
            log(f"{x.name}: left out, the package {x.package} is not installed")
        else:
            found.append(x)
    return found


FEW = frozenset(QUICK_SEQLENS)  # of those that take long to lower or to compile
IMPLEMENTATIONS = (
    Implementation("jax_fa3", fa3, target="jax_fa3_{mode}"),
    Implementation("cudnn", partial(jax_nn, "cudnn")),
    # Keeps the scores of every head in memory: timed where they fit.
    Implementation("xla", partial(jax_nn, "xla"), seqlens=range(4097), serial=True),
    # Its float16 buffers are written into the code, and lowering it takes seconds.
    Implementation("mosaic", mosaic, prescaled=True, dtype=jnp.float16, seqlens=FEW),
    Implementation("FA3", upstream, package="dew_flash_attn"),
    Implementation("triton", triton, seqlens=FEW),
    Implementation("tokamax", partial(tokamax, "mosaic"), package="tokamax", seqlens=FEW),
    Implementation("tokamax triton", partial(tokamax, "triton"), package="tokamax", seqlens=FEW),
)
