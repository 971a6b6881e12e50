"""The contract of contract.py, kept by the XLA implementation."""

import dataclasses

import pytest

import contract
import nonfinite
from cases import CASES, LENGTHS, ODD_DIMS, PACKED

XLA = contract.Implementation("xla")
DEFAULT = contract.Implementation(None)  # the way of the kernels, with XLA at its end on the CPU
PADDED = [case for case in CASES if case.query_lengths or case.key_lengths] + PACKED[::3]


def case_name(case):
    return case.name


@pytest.mark.parametrize("case", CASES + ODD_DIMS, ids=case_name)
def test_results(case):
    contract.check_results(XLA, case)


@pytest.mark.parametrize("case", LENGTHS + CASES[::15], ids=case_name)
def test_results_of_the_default(case):
    contract.check_results(DEFAULT, dataclasses.replace(case, dtype="bfloat16"))


@pytest.mark.parametrize("case", PADDED, ids=case_name)
def test_padding_reaches_nothing(case):
    contract.check_padding(XLA, case)


@pytest.mark.parametrize("case", CASES[::12], ids=case_name)
def test_repeats_bit_by_bit(case):
    contract.check_repeat(XLA, case, times=3, gradients=True)


@pytest.mark.parametrize(("operand", "poison"), nonfinite.NONFINITE)
def test_nonfinite_inputs_stay_in_their_rows(operand, poison):
    nonfinite.check_nonfinite(XLA, nonfinite.NONFINITE_CASE, operand, poison)


@pytest.mark.parametrize("window", [None, (20, 5)])
def test_index_values_outside_the_arrays(window):
    contract.check_index_values(XLA, dataclasses.replace(contract.INDEX_CASE, window=window))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_of_one_result(dtype):
    contract.check_gradient_of_one_result(
        XLA, dataclasses.replace(contract.INDEX_CASE, dtype=dtype)
    )


def test_forward_alone():
    contract.check_forward_alone(XLA, nonfinite.NONFINITE_CASE)
    contract.check_forward_alone(XLA, contract.INDEX_CASE)
