"""The contract: what a call must do, whichever implementation answers it.

Every check takes an Implementation and a Case; the CPU suite runs them for the XLA implementation,
the GPU suite the very same ones for the kernels.  Results are judged by the oracle and by the
tolerance rule; zeros and infinities that the documentation promises are compared exactly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import tolerance
from cases import Case
from jax_fa3 import dot_product_attention
from oracle import Results


class Implementation:
    """One value of `implementation=` under test."""

    def __init__(self, name):
        self.name = name

    def prepare(self, executable):
        """Called before every run; the GPU suite spoils free memory here."""

    @functools.cache  # noqa: B019  (lives as long as the session)
    def compile(self, case):
        """Forward with residual, and the vjp of both results, as one executable; the Results as a
        dictionary."""

        def run(query, key, value, dout, dlse, index, heads):
            def attend(query, key, value, sinks):
                out, lse, *max_logits = dot_product_attention(
                    query,
                    key,
                    value,
                    return_residual=True,
                    implementation=self.name,
                    **case.options,
                    **index,
                    **heads | sinks,
                )
                return (out, lse), max_logits

            sinks = {name: x for name, x in heads.items() if name == "sinks"}
            return results_of(attend, dout, dlse, query, key, value, sinks)

        arrays = case.index_arrays, case.head_arrays
        return jax.jit(run).lower(*case.inputs(), *arrays).compile()

    def run(self, case, inputs, **index):
        """The case on these inputs; `index` replaces index arrays by name."""
        executable = self.compile(case)
        self.prepare(executable)
        results = executable(*inputs, case.index_arrays | index, case.head_arrays)
        return as_results(results)


def results_of(attend, dout, dlse, *operands, names=("dquery", "dkey", "dvalue")):
    """The Results, as a dictionary, of attend(*operands): a pair of output and LSE, and a list that
    may have the largest logits. `names`: of the gradients, before those of sinks, which come last,
    in a dictionary that may be empty."""
    (out, lse), vjp, max_logits = jax.vjp(attend, *operands, has_aux=True)
    *gradients, dsinks = vjp((dout, dlse))
    results = dict(out=out, lse=lse) | dict(zip(names, gradients, strict=True))
    if dsinks:
        (dsinks,) = dsinks.values()
        results["dsinks"] = dsinks[None] if dsinks.ndim == 1 else dsinks
    if max_logits:
        (results["max_logits"],) = max_logits
    return results


def as_results(results):
    return Results(**{name: np.asarray(x) for name, x in results.items()})


IN_FLOAT32 = "lse", "dsinks", "max_logits"


def check_results(implementation, case, inputs=None):
    """Output, LSE and gradients near the oracle's; what must be zero is zero."""
    inputs = case.inputs() if inputs is None else inputs
    got = implementation.run(case, inputs)
    for name, result in got.items():
        assert result.dtype == ("float32" if name in IN_FLOAT32 else case.dtype), name
    compare(case, inputs, got)


def compare(case, inputs, got):
    """`got` against the oracle for these inputs."""
    exact = case.reference(inputs)
    same = case.reference(inputs, case.dtype)
    for (name, result), (_, x), (_, s) in zip(
        got.items(), exact.items(), same.items(), strict=True
    ):
        tolerance.check(name, result, x, s)
    blind, unseen = case.blind, case.unseen
    for name, rows in (("out", blind), ("dquery", blind), ("dkey", unseen), ("dvalue", unseen)):
        assert not np.any(getattr(got, name)[rows]), f"{name} is not exactly zero where it must be"
    without_lse = blind
    if case.sinks is not None:
        without_lse = np.swapaxes(
            np.broadcast_to(~case.row_exists, got.lse.swapaxes(1, 2).shape), 1, 2
        )
    assert np.all(np.isneginf(got.lse[without_lse])), "lse of a row without logits is not -inf"


def spoil_padding(case, inputs):
    """NaN and infinities in every row past its sequence's length."""
    query, key, value, dout, dlse = (np.array(x) for x in inputs)
    for array, rows in (
        (query, case.query_used),
        (key, case.key_used),
        (value, case.key_used),
        (dout, case.query_used),
        (dlse, case.query_used),
    ):
        array[~rows] = np.nan
        array[~rows, ::2] = np.inf
    return query, key, value, dout, dlse


def check_padding(implementation, case):
    """What stands in the padding reaches nothing."""
    assert case.query_lengths or case.key_lengths or case.has_visibility
    check_results(implementation, case, spoil_padding(case, case.inputs()))


def check_repeat(implementation, case, times, gradients):
    """Equal inputs give equal bits: the forward always, the gradients where promised."""
    inputs = [jax.device_put(x) for x in case.inputs()]
    names = [name for name, _ in implementation.run(case, inputs).items()]
    names = names if gradients else ["out", "lse"]
    first = implementation.run(case, inputs)
    for time in range(times):
        again = implementation.run(case, inputs)
        for name in names:
            assert getattr(first, name).tobytes() == getattr(again, name).tobytes(), (
                f"{name} differs in run {time} of {case.name}"
            )


def check_index_values(implementation, case):
    """Index values outside the arrays mean their nearest legal value."""
    inputs = case.inputs()
    lowest, highest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    for lengths in ((-1, case.seqlen_q + 1), (lowest, highest)):
        values = np.asarray(lengths, np.int32)
        got = implementation.run(
            case, inputs, query_seq_lengths=values, key_value_seq_lengths=values[::-1].copy()
        )
        legal = tuple(np.clip(lengths, 0, case.seqlen_q).tolist())
        compare(
            dataclasses.replace(case, query_lengths=legal, key_lengths=legal[::-1]), inputs, got
        )
    for offset in ((lowest, highest), (-(1 << 30), 1 << 30), (highest - 1, lowest + 1)):
        values = np.asarray(offset, np.int32)
        got = implementation.run(case, inputs, query_offset=values)
        compare(dataclasses.replace(case, offset=offset), inputs, got)


def check_gradient_of_one_result(implementation, case):
    """A loss may use the output alone or the LSE alone; operands may be differentiated alone."""
    query, key, value, dout, dlse = inputs = case.inputs()

    def attend(query, key, value, **more):
        return dot_product_attention(
            query,
            key,
            value,
            implementation=implementation.name,
            **more,
            **case.options,
            **case.index_arrays,
        )

    def of_out(*operands):
        return jnp.vdot(attend(*operands).astype(jnp.float32), dout.astype(np.float32))

    def of_lse(*operands):
        lse = attend(*operands, return_residual=True)[1]
        return jnp.vdot(jnp.where(jnp.isneginf(lse), 0.0, lse), dlse)

    for loss, cotangents in (
        (of_out, (dout, np.zeros_like(dlse))),
        (of_lse, (np.zeros_like(dout), dlse)),
    ):
        shares = (*inputs[:3], *cotangents)
        exact, same = (case.reference(shares, precision) for precision in ("exact", case.dtype))
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)
        for name, got in zip(("dquery", "dkey", "dvalue"), gradients, strict=True):
            tolerance.check(
                f"{name} {loss.__name__}", got, getattr(exact, name), getattr(same, name)
            )
    alone = jax.jit(jax.grad(of_out, argnums=1))(query, key, value)
    exact, same = (
        case.reference((*inputs[:4], np.zeros_like(dlse)), precision)
        for precision in ("exact", case.dtype)
    )
    tolerance.check("dkey alone", alone, exact.dkey, same.dkey)


def check_forward_alone(implementation, case):
    """Without residual, and without differentiation; with and without a batch dimension."""
    inputs = case.inputs()
    exact, same = case.reference(inputs), case.reference(inputs, case.dtype)

    @functools.partial(jax.jit, static_argnames="return_residual")
    def attend(query, key, value, index, return_residual=False):
        return dot_product_attention(
            query,
            key,
            value,
            return_residual=return_residual,
            implementation=implementation.name,
            **case.options,
            **index,
        )

    tolerance.check("out", attend(*inputs[:3], case.index_arrays), exact.out, same.out)
    out, lse = attend(*inputs[:3], case.index_arrays, return_residual=True)
    tolerance.check("out", out, exact.out, same.out)
    tolerance.check("lse", lse, exact.lse, same.lse)
    for b in range(case.batch):
        index = {name: values[b : b + 1] for name, values in case.index_arrays.items()}
        out, lse = attend(*(x[b] for x in inputs[:3]), index, return_residual=True)
        tolerance.check("out, no batch", out, exact.out[b], same.out[b])
        tolerance.check("lse, no batch", lse, exact.lse[b], same.lse[b])


INDEX_CASE = Case(
    batch=2,
    seqlen_q=50,
    seqlen_k=50,
    head_dim=32,
    causal=True,
    window=(20, 5),
    query_lengths=(50, 50),
    key_lengths=(50, 50),
    offset=(0, 0),
)
