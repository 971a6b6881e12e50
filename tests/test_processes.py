"""The same programs in one process with eight devices and in two with four each: the same bits."""

import os

import jax

from processes import digests, digests_of_processes


def test_two_processes_give_the_bits_of_one():
    four = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    assert digests_of_processes([four, four]) == digests(jax.devices())
