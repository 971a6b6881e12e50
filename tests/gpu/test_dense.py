"""Biases and dense masks on the kernels: random problems of all kinds, and what they must have in
common with the arguments that say the same."""

import ml_dtypes
import numpy as np
import pytest
from kernels import KERNELS

import dense
from case import Case

IN_A_TEST = 4
CASES = [dense.random_case(number) for number in range(dense.NUMBERS)]
REPEATED = [case for case in CASES if case.bias and case.wants_dbias and case.mask][::12]


def case_name(case):
    return case.name


@pytest.mark.parametrize("first", range(0, dense.NUMBERS, IN_A_TEST))
def test_random_problems(first):
    for case in CASES[first : first + IN_A_TEST]:
        dense.check(KERNELS, case)


@pytest.mark.parametrize("case", REPEATED, ids=case_name)
def test_repeats_bit_by_bit(case):
    first, *others = dense.run(KERNELS, case, times=40)
    for again in others:
        for (name, x), (_, y) in zip(again.items(), first.items(), strict=True):
            assert x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize(("case", "dims"), dense.SAID, ids=lambda x: getattr(x, "name", x))
def test_arguments_said_by_a_mask(case, dims):
    dense.check_said_by_a_mask(KERNELS, case, dims)


@pytest.mark.parametrize("case", dense.HIDDEN, ids=case_name)
def test_a_bias_hides_as_a_mask_does(case):
    dense.check_bias_that_hides(KERNELS, case)


@pytest.mark.parametrize("case", dense.ASKED, ids=case_name)
def test_what_is_asked_for(case):
    dense.check_what_is_asked_for(KERNELS, case)


@pytest.mark.parametrize("case", dense.ALONE, ids=case_name)
def test_without_a_batch(case):
    dense.check_without_a_batch(KERNELS, case)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_a_bias_below_float32(head_dim):
    """Whose score in base 2 is no finite float32 number: it counts as -inf."""
    case = Case(seqlen_q=140, seqlen_k=200, head_dim=head_dim)
    lowest = ml_dtypes.finfo("bfloat16").min
    bias = np.zeros((1, 2, 140, 200), "bfloat16")
    bias[:, :, ::3] = lowest  # whole rows
    bias[:, 1, :, 50:120] = lowest
    got = dense.run_alone(KERNELS, case.inputs(), bias=bias)
    hidden = np.where(bias == lowest, -np.inf, 0).astype("bfloat16")
    want = dense.run_alone(KERNELS, case.inputs(), bias=hidden)
    for (name, x), (_, y) in zip(got.items(), want.items(), strict=True):
        assert x.tobytes() == y.tobytes(), name
    assert np.isneginf(got.lse[:, ::3]).all() and not np.any(got.out[:, ::3])
