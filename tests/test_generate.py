"""The generating example: continuous batching over pages gives the tokens of the model without a
cache, in float32 exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decoder import Config, Decoder
from paged import Generator, attention, check_greedy

CONFIG = Config(31, 2, 32, 4, 2, 16, jnp.float32)
LENGTHS, LIMITS = (5, 17, 20, 2), (3, 12, 9, 7)


@functools.cache
def draw_parameters():
    def create():
        return nnx.state(Decoder(CONFIG, attention, rngs=nnx.Rngs(0)))

    return jax.jit(create, compiler_options={"xla_backend_optimization_level": 0})()


def test_tokens_are_those_without_a_cache():
    """Two seats and pages for two sequences: the third waits, and gets the pages of the first."""
    parameters = draw_parameters()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 31, n).astype(np.int32) for n in LENGTHS]
    generator = Generator(
        CONFIG, parameters, seats=2, num_pages=9, page_size=4, pages_each=8, chunk=8
    )
    events = list(generator.run(zip(prompts, LIMITS, strict=True)))
    sequences = [event.sequence for event in events if event.is_last]
    assert [x.number for x in sequences] == [0, 1, 2, 3]
    assert tuple(len(x.generated) for x in sequences) == LIMITS
    for x in sequences:
        assert [e.token for e in events if e.sequence is x] == x.generated
    assert set(sequences[2].pages) & set(sequences[0].pages)
    assert sorted(generator.free) == list(range(9)) and not any(generator.seats)
    assert 0 < generator.tokens < sum(LIMITS) and generator.seconds > 0
    assert not check_greedy(CONFIG, parameters, sequences, margin=0.0)
    sequences[1].generated[4] = (sequences[1].generated[4] + 1) % 31
    assert check_greedy(CONFIG, parameters, sequences, margin=0.0)


def test_a_prompt_that_never_fits():
    generator = Generator(CONFIG, draw_parameters(), seats=1, num_pages=2, page_size=4)
    with pytest.raises(ValueError, match="prompt 0 and its limit need 3 pages"):
        list(generator.run([(np.zeros(5, np.int32), 4)]))
