"""Trains the demo's decoder on windows of its text, and generates from it with a paged cache.

Prompts of different length share the seats of a batch; their text is printed line by line as its
tokens come, with the number of its sequence. The first sequence ends early, and a prompt that
waited takes its seat and its pages. Runs on whatever JAX finds: on jax_fa3's kernels on a Hopper
GPU, through XLA anywhere else. Exits with 1 if the tokens are not those of the model without a
cache.

    python examples/generate.py [--short] [--steps N] [--tokens N]
"""

import argparse
import sys
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from paged import Generator, Sequence, check_greedy
from training import add_arguments, choose_setup, describe, read_alphabet, read_text, train, windows

PROMPTS = (12, 90, 30, 55, 20)  # their lengths
SEATS = 3
LINE = 64  # characters
MARGIN = {"float32": 1e-4, "bfloat16": 2e-2}  # of logits, which rounding may bridge


def stream(generator: Generator, prompts, alphabet: str) -> list[Sequence]:
    """Prints each sequence's text as it comes; returns the sequences."""
    lines, pages, sequences = defaultdict(str), {}, {}
    for event in generator.run(prompts):
        sequence = event.sequence
        if sequence.number not in sequences:
            sequences[sequence.number] = sequence
            left = [x for x, of_x in pages.items() if of_x & set(sequence.pages)]
            again = f", in pages that {', '.join(map(str, left))} left" if left else ""
            prompt = "".join(alphabet[i] for i in sequence.prompt)
            print(f"[{sequence.number}] {prompt!r} ...{again}", flush=True)
        lines[sequence.number] += alphabet[event.token]
        if event.is_last or len(lines[sequence.number]) == LINE:
            end = "  (ends)" if event.is_last else ""
            print(f"[{sequence.number}]   {lines.pop(sequence.number)!r}{end}", flush=True)
        if event.is_last:
            pages[sequence.number] = set(sequence.pages)
    return [sequences[number] for number in sorted(sequences)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=160, help="tokens of each prompt")
    args = parser.parse_args()

    tokens, vocabulary = read_text()
    setup = choose_setup(vocabulary, args)
    print(f"{describe(setup)} on {jax.devices()[0].device_kind}")
    parameters, losses = train(setup, jax_fa3.dot_product_attention, windows(tokens, setup))
    print(f"loss {losses[0]:.3f} -> {np.mean(losses[-10:]):.3f}\n")

    rng = np.random.default_rng(2)
    starts = rng.integers(0, len(tokens) - max(PROMPTS), len(PROMPTS))
    limits = [max(args.tokens // 4, 1)] + [args.tokens] * (len(PROMPTS) - 1)
    prompts = [
        (tokens[start : start + length], limit)
        for start, length, limit in zip(starts, PROMPTS, limits, strict=True)
    ]
    pages_each = -(-(max(PROMPTS) + args.tokens) // 16)
    generator = Generator(
        setup.config,
        parameters,
        seats=SEATS,
        num_pages=SEATS * pages_each - pages_each // 2,
        pages_each=pages_each,
    )
    sequences = stream(generator, prompts, read_alphabet())
    speed = generator.tokens / generator.seconds if generator.seconds else 0.0
    count = sum(len(x.generated) for x in sequences)
    print(f"\n{count} tokens of {len(sequences)} prompts; {speed:,.0f} tokens/s once compiled")
    margin = MARGIN[jnp.dtype(setup.config.dtype).name]
    problems = check_greedy(setup.config, parameters, sequences, margin)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    if not problems:
        print("the tokens are those of the model without a cache")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
