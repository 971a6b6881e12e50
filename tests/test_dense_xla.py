"""The checks of dense.py, kept by the XLA implementation: that they are right themselves, for they
are what the kernels are judged by."""

import collections
import dataclasses

import numpy as np
import pytest

import contract
import dense
from jax_fa3.reference import Reference

XLA = contract.Implementation("xla")
CASES = [dense.random_case(n) for n in range(dense.NUMBERS)]
SMALL = [case for case in CASES if max(case.seqlen_q, case.seqlen_k) <= 300]


def case_name(case):
    return case.name


def test_random_problems_are_of_all_kinds():
    assert len({case.name for case in CASES}) == len(CASES) >= 300
    met = collections.defaultdict(collections.Counter)
    for case in CASES:
        for field in dataclasses.fields(case):
            met[field.name][getattr(case, field.name)] += 1
        for what in ("documents", "intervals", "chunk", "query_lengths", "key_lengths", "window"):
            if getattr(case, what) is not None:
                met["beside"][what, case.bias is not None, case.mask is not None] += 1
    for field, dims in (("bias", dense.BIAS_DIMS), ("mask", dense.MASK_DIMS)):
        assert {x.replace("g", "b") for x in met[field] if x} == set(dims)
        assert sum(n for x, n in met[field].items() if x and "g" in x) >= 20
    for field, values in (
        ("bias_values", dense.BIAS_VALUES),
        ("mask_values", dense.MASK_VALUES),
        ("fold", (None, 2)),
        ("wants_dbias", (True, False)),
        ("is_short", (True, False)),
        ("deterministic", (None, True, False)),
        ("intervals", (None, "any", "row", "prefix", "head", "kv head")),
        ("scale", (None, 0.05, -0.3, 0.0)),
    ):
        assert set(met[field]) == set(values) and min(met[field].values()) >= 8, field
    assert {(x.head_dim, x.head_dim_v or x.head_dim) for x in CASES} == set(dense.HEAD_DIMS)
    assert len(met["beside"]) == 6 * 3 and min(met["beside"].values()) >= 8


@pytest.mark.parametrize("case", SMALL[::12], ids=case_name)
def test_random_problems(case):
    dense.check(XLA, case)


@pytest.mark.parametrize(("case", "dims"), dense.SAID[::5], ids=lambda x: getattr(x, "name", x))
def test_arguments_said_by_a_mask(case, dims):
    dense.check_said_by_a_mask(XLA, case, dims)


@pytest.mark.parametrize("case", dense.HIDDEN[::5], ids=case_name)
def test_a_bias_hides_as_a_mask_does(case):
    dense.check_bias_that_hides(XLA, case)


@pytest.mark.parametrize("case", dense.ASKED[::3], ids=case_name)
def test_what_is_asked_for(case):
    """With the passes that users have: without them the bits of two programs may differ."""
    dense.check_what_is_asked_for(XLA, case, xla_backend_optimization_level=3)


def test_without_a_batch():
    dense.check_without_a_batch(XLA, dense.ALONE[0])


@pytest.mark.parametrize("case", SMALL[::4], ids=case_name)
def test_the_oracle_agrees_with_the_documented_reference(case):
    if case.fold:
        case = dataclasses.replace(case, fold=None, **without_parts(case))
    query, key, value, dout, dlse = case.inputs()
    options = {name: x for name, x in case.options.items() if name != "deterministic"}
    arrays = dict(bias=case.bias_array, mask=case.mask_array) | case.index_arrays
    theirs = Reference(query, key, value, **options, **arrays)
    gradients = theirs.gradients(dout, dlse)
    want = [theirs.out, theirs.lse, gradients.query, gradients.key, gradients.value]
    want += [gradients.bias] if case.wants_dbias and case.bias else []
    for (name, got), x in zip(case.reference(case.inputs()).items(), want, strict=True):
        np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-10, err_msg=name)


def without_parts(case):
    """The dimensions of an array for each part of the batch, as ones for each sequence."""
    dims = dict(bias=case.bias, mask=case.mask)
    return {name: x.replace("g", "b") for name, x in dims.items() if x}


def test_a_plane_that_serves_several_sequences():
    """Its gradient is the sum of theirs."""
    case = dense.Dense(batch=6, seqlen_q=20, seqlen_k=30, bias="ghts", fold=2)
    each = dataclasses.replace(case, bias="bhts", fold=None)
    object.__setattr__(each, "bias_array", np.repeat(case.bias_array, 3, axis=0))
    inputs = case.inputs()
    got, want = case.reference(inputs), each.reference(inputs)
    np.testing.assert_allclose(got.dbias, want.dbias.reshape(2, 3, 2, 20, 30).sum(1), atol=1e-12)
    np.testing.assert_allclose(got.dquery, want.dquery, atol=1e-12)
