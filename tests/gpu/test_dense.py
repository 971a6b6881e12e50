"""Biases and dense masks on the kernels: random problems of all kinds, and what they must share with
the arguments that say the same."""

import pytest
from kernels import KERNELS

import dense

RANDOM, IN_A_TEST = 384, 4


@pytest.mark.parametrize("first", range(0, RANDOM, IN_A_TEST))
def test_random_problems(first):
    for number in range(first, first + IN_A_TEST):
        dense.check(KERNELS, dense.random_case(number))
