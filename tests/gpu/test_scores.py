"""Sinks, largest logits, caps and slopes on the kernels: random problems of all kinds."""

import pytest
from kernels import KERNELS

import dense
import scores

IN_A_TEST = 4
CASES = [scores.random_case(number) for number in range(scores.NUMBERS)]
REPEATED = [case for case in CASES if case.sinks and case.max_logits][::24]


@pytest.mark.parametrize("first", range(0, scores.NUMBERS, IN_A_TEST))
def test_random_problems(first):
    for case in CASES[first : first + IN_A_TEST]:
        dense.check(KERNELS, case)


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.name)
def test_repeats_bit_by_bit(case):
    """What has sinks and largest logits in it; of the gradients theirs and those of keys."""
    first, *others = dense.run(KERNELS, case, times=40)
    for again in others:
        for (name, x), (_, y) in zip(again.items(), first.items(), strict=True):
            if name != "dquery" or case.deterministic or case.bias:
                assert x.tobytes() == y.tobytes(), name
