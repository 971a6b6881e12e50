"""What runs each direction of a call, the kernels or XLA, decided once; and if XLA, why.

Four questions, asked in this order: does the call want something no kernel does, such as float32,
does this build have a kernel for its shapes, is there a Hopper GPU, and can a kernel be linked with
the call's functions, if it has any. A reason is one sentence a
user can act on.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import glob
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_fa3 import native
from jax_fa3.arguments import Arguments, dtype_name
from jax_fa3.native import KERNEL_DTYPES, Target
from jax_fa3.operands import Operands
from jax_fa3.options import FLOAT8, AttentionOptions, Route, Routes, dense_mask_words

logger = logging.getLogger("jax_fa3")

MIN_SCALE = 2.0**-100  # the backward pass divides by it
MIN_SOFT_CAP, MAX_SOFT_CAP = 2.0**-10, 2.0**20  # scale / cap and cap * score stay in range
MAX_DENSE_MASK_WORDS = 2**31 - 1  # of a plane, which the kernels count in 32 bits
COMPUTE_CAPABILITY = "9.0"  # H100, H200, GH200


class Reasons(NamedTuple):
    """Why the kernels do not run a call, one reason for each thing in the way."""

    call: str | None  # no kernel of either direction
    float8: str | None  # no kernel of the forward pass in float8
    rounding: str | None  # nor any that rounds to it, but those in 16 bits run the call
    device: str | None  # nothing to run a kernel on
    link: str | None = None  # nothing to link a kernel with

    @property
    def first(self) -> str | None:
        return self.call or self.float8 or self.rounding or self.device or self.link

    @property
    def runs(self) -> str:
        """What the call runs."""
        if self.first is None:
            return "the Hopper kernels"
        if self.first == self.rounding:
            return "its forward pass in the dtype of its inputs"
        return "its XLA implementation"


FORCED = Reasons("implementation is 'xla'", None, None, None)

# What is told of each call that is traced, if anyone asks.
listener: contextvars.ContextVar[Callable[[Any, Reasons], None] | None]
listener = contextvars.ContextVar("listener", default=None)


def tell(arguments: Any, reasons: Reasons) -> None:
    """Of a call's arguments as a record, those of a call over a cache too."""
    listen = listener.get()
    if listen is not None:
        listen(arguments, reasons)


def decide(arguments: Arguments, options: AttentionOptions) -> AttentionOptions:
    """The options of a checked call, with its routes. "auto" leaves the choice to the platform that
    the program is lowered for. Raises, or logs, with the reason, where the kernels do not run the
    call as it is.
    """
    if arguments.implementation == "xla":
        tell(arguments, FORCED)
        return dataclasses.replace(options, routes=Routes("xla", "xla"))
    reasons = reasons_of(arguments, options)
    tell(arguments, reasons)
    if reasons.first and arguments.implementation == "fa3":
        raise NotImplementedError(
            f"implementation is 'fa3', which cannot run this call: {reasons.first}. "
            f"implementation=None runs {reasons.runs}."
        )
    if reasons.first:
        log_fallback(reasons.runs, reasons.first, arguments.function)
    if reasons.rounding and not reasons.call:
        options = dataclasses.replace(options, forward_dtype=None)
    routes = _routes(arguments, reasons)
    return options if routes == options.routes else dataclasses.replace(options, routes=routes)


def _routes(arguments: Arguments, reasons: Reasons) -> Routes:
    if reasons.first is None:
        return Routes() if arguments.implementation is None else Routes("fa3", "fa3")
    if reasons.call or reasons.link or (reasons.device and has_gpu()):
        return Routes("xla", "xla")
    return Routes("xla" if reasons.float8 else "auto", "auto")


def reasons_of(arguments: Arguments, options: AttentionOptions) -> Reasons:
    """Of a checked call, whose arrays may be types."""
    call, float8, rounding = _call_reason(arguments), None, None
    planned = _planned(arguments, options)
    refusal = functools.partial(_refusal, arguments=arguments, planned=planned)
    if call is None and not arguments.is_float8:
        call = refusal("forward") or refusal("backward")
    if options.forward_dtype is not None and arguments.arrays.keys() & {"bias", "mask"}:
        rounding = "the float8 kernels take no bias and no dense mask"
    elif options.forward_dtype is not None and (wish := _of_scores(arguments)):
        rounding = f"the float8 kernels take no {wish}"
    elif _is_float8_forward(arguments, options):
        float8 = refusal("forward_float8")
    return Reasons(call, float8, rounding, device_reason(), arguments.why_not_linked())


def plans(arguments: Arguments, options: AttentionOptions) -> dict[str, dict[str, Any]]:
    """What a call would run on the kernels, direction by direction; nothing where they do not take
    it."""
    reasons = reasons_of(arguments, options)
    if reasons.call or reasons.float8:
        return {}
    in_float8 = _is_float8_forward(arguments, options) and not reasons.rounding
    forward = "forward_float8" if in_float8 else "forward"
    found = {"forward": native.plan(forward, *_planned(arguments, options))}
    if not arguments.is_float8:
        found["backward"] = native.plan("backward", *_planned(arguments, options))
    return found


def kernels_round(operands: Operands) -> bool:
    """Whether the kernels may round these 16-bit arrays to float8: where they run the forward pass
    of `forward_dtype`."""
    arguments = Arguments(operands.query, operands.key, operands.value, forward_dtype=FLOAT8)
    if arguments.dtype not in KERNEL_DTYPES or (has_gpu() and device_reason()):
        return False
    return not _refusal("forward_float8", arguments, _planned(arguments, arguments.options()))


def of_visibility(implementation: str | None = None) -> Route:
    """What makes a table of visibility."""
    has_kernel = native.module() is not None and not (has_gpu() and device_reason())
    return "auto" if has_kernel and implementation != "xla" else "xla"


def _call_reason(arguments: Arguments) -> str | None:
    """What the call asks for that no kernel does."""
    dtype, scale = arguments.dtype, arguments.scale
    if dtype not in (*KERNEL_DTYPES, FLOAT8):
        return f"the kernels take {' or '.join(KERNEL_DTYPES)}, not {dtype}"
    if scale is not None and 0 < abs(scale) < MIN_SCALE:
        return f"the kernels take scales of at least {MIN_SCALE:g} in magnitude, not {scale:g}"
    by_functions = arguments.why_no_function_kernel()
    return by_functions or _dense_reason(arguments) or _score_reason(arguments)


def _score_reason(arguments: Arguments) -> str | None:
    """What no kernel does with the arguments that `_of_scores` knows."""
    if arguments.is_float8 and (wish := _of_scores(arguments)):
        return f"the kernels take no {wish} with {FLOAT8} inputs"
    variants = ("bias", "mask"), ("logits_soft_cap",), ("alibi_slopes",)
    given = [[name for name in names if getattr(arguments, name) is not None] for names in variants]
    together = [names[0] for names in given if names]
    if len(together) > 1:
        return f"the kernels take {together[0]} and {together[1]} one at a time"
    cap = arguments.logits_soft_cap
    if cap is not None and not MIN_SOFT_CAP <= cap <= MAX_SOFT_CAP:
        return (
            f"the kernels take a logits_soft_cap from {MIN_SOFT_CAP:g} to {MAX_SOFT_CAP:g}, not "
            f"{cap:g}"
        )
    return None


def _of_scores(arguments: Arguments) -> str | None:
    """The first argument given that the float8 kernels do not know."""
    names = "logits_soft_cap", "alibi_slopes", "sinks"
    found = [name for name in names if getattr(arguments, name) is not None]
    found += ["return_max_logits"] * bool(arguments.return_max_logits)
    return next(iter(found), None)


def _dense_reason(arguments: Arguments) -> str | None:
    """What no kernel does with a bias or a dense mask."""
    bias, mask, seqlen_k = arguments.bias, arguments.mask, arguments.extents.seqlen_k
    if arguments.is_float8 and (bias is not None or mask is not None):
        return f"the kernels take no bias and no dense mask with {FLOAT8} inputs"
    if bias is not None and dtype_name(bias) != arguments.dtype:
        return (
            f"the kernels take a bias of query's dtype, {arguments.dtype}, not {bias.dtype}: cast "
            "the bias, if its values allow it"
        )
    if bias is not None and bias.shape[-1:] != (seqlen_k,):
        return (
            f"the kernels take a bias for all {seqlen_k} keys, not of shape {tuple(bias.shape)}: "
            "broadcast its last dimension"
        )
    if mask is not None and arguments.extents.are_static:
        words = dense_mask_words(mask.shape[-2] if mask.ndim > 1 else 1, seqlen_k)
        if words > MAX_DENSE_MASK_WORDS:
            return (
                f"the kernels take a dense mask of at most {MAX_DENSE_MASK_WORDS} words for each "
                f"sequence and head, and a mask of shape {tuple(mask.shape)} needs {words}"
            )
    return None


def _is_float8_forward(arguments: Arguments, options: AttentionOptions) -> bool:
    return arguments.is_float8 or options.forward_dtype is not None


def _refusal(target: Target, arguments: Arguments, planned: tuple[Any, ...]) -> str | None:
    """Why this build has no kernel for the shapes of a legal call; `planned` as _planned has it."""
    if native.module() is not None and not arguments.extents.are_static:
        shape = tuple(arguments.query.shape)
        return f"the kernels need static shapes, not query of shape {shape}"
    return native.refusal(target, *planned)


def _planned(arguments: Arguments, options: AttentionOptions) -> tuple[Any, ...]:
    """What native.plan takes after its target. Of 16-bit inputs the forward pass in float8 prepares
    value by itself."""
    prepared = bool(arguments.value_is_prepared) or options.forward_dtype is not None
    index = arguments.arrays.keys() & Operands.rows().keys()
    return arguments.dtype, arguments.extents, options, prepared, frozenset(index)


def device_reason() -> str | None:
    """Why the kernels cannot run on the devices of the default backend."""
    if not has_gpu():
        backend = f"the default backend is {jax.default_backend()!r}"
        if not glob.glob("/dev/nvidia[0-9]*"):
            return f"there is no NVIDIA GPU: {backend}"
        return (
            f"JAX does not use this machine's NVIDIA GPU: {backend}; install jax[cuda13], and "
            "leave JAX_PLATFORMS unset"
        )
    for device in jax.local_devices():
        capability = getattr(device, "compute_capability", None)
        if capability != COMPUTE_CAPABILITY:
            return (
                f"the kernels need compute capability {COMPUTE_CAPABILITY} (H100, H200), and "
                f"{device.device_kind} has {capability}"
            )
    if native.module() is not None and not native.module().cuda_enabled:
        return "jax_fa3 was built without CUDA kernels (JAX_FA3_CUDA=OFF)"
    return None


def has_gpu() -> bool:
    """Whether the default backend is a GPU's."""
    return jax.default_backend() == "gpu"


@functools.lru_cache(maxsize=256)
def log_fallback(runs: str, reason: str, function: str = "dot_product_attention") -> None:
    """Says, once for each reason, what a call runs in place of the kernels, and why."""
    logger.warning("%s runs %s: %s", function, runs, reason)
