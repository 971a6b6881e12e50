"""The contract of contract.py, kept by the kernels: the shared cases and larger ones."""

import dataclasses

import pytest
from kernels import KERNELS, LARGE, PADDED, SHARED

import contract
import nonfinite
from cases import Case


def case_name(case):
    return case.name


@pytest.mark.parametrize("case", SHARED + LARGE, ids=case_name)
def test_results(case):
    contract.check_results(KERNELS, case)


@pytest.mark.parametrize("case", PADDED, ids=case_name)
def test_padding_reaches_nothing(case):
    contract.check_padding(KERNELS, case)


@pytest.mark.parametrize("case", LARGE[::9], ids=case_name)
def test_forward_repeats_bit_by_bit(case):
    contract.check_repeat(KERNELS, case, times=50, gradients=False)


NONFINITE_CASES = [
    nonfinite.NONFINITE_CASE,
    dataclasses.replace(
        nonfinite.NONFINITE_CASE, seqlen_q=400, seqlen_k=500, head_dim=128, window=None
    ),
    dataclasses.replace(
        nonfinite.NONFINITE_CASE,
        seqlen_q=300,
        seqlen_k=300,
        head_dim=64,
        window=(200, 30),
        causal=False,
        dtype="float16",
    ),
]


@pytest.mark.parametrize(("operand", "poison"), nonfinite.NONFINITE)
@pytest.mark.parametrize("case", NONFINITE_CASES, ids=case_name)
def test_nonfinite_inputs_stay_in_their_rows(case, operand, poison):
    nonfinite.check_nonfinite(KERNELS, case, operand, poison)


@pytest.mark.parametrize("window", [None, (20, 5)])
@pytest.mark.parametrize("seqlen", [50, 333])
def test_index_values_outside_the_arrays(seqlen, window):
    lengths = (seqlen, seqlen)
    case = dataclasses.replace(
        contract.INDEX_CASE,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        query_lengths=lengths,
        key_lengths=lengths,
        window=window,
    )
    contract.check_index_values(KERNELS, case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_of_one_result(dtype):
    contract.check_gradient_of_one_result(
        KERNELS, dataclasses.replace(contract.INDEX_CASE, dtype=dtype)
    )


def test_forward_alone():
    contract.check_forward_alone(KERNELS, nonfinite.NONFINITE_CASE)
    contract.check_forward_alone(KERNELS, contract.INDEX_CASE)


def test_more_sequences_than_a_grid_dimension_holds():
    contract.check_results(
        KERNELS, Case(batch=70_000, seqlen_q=1, seqlen_k=3, heads_q=2, heads_kv=1, head_dim=8)
    )


def test_more_heads_than_a_grid_dimension_holds():
    contract.check_results(
        KERNELS,
        Case(
            batch=1,
            seqlen_q=2,
            seqlen_k=1,
            heads_q=70_000,
            heads_kv=35_000,
            head_dim=8,
            causal=True,
        ),
    )
