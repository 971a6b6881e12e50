"""Random calls of the public API, legal and illegal ones, against the float64 oracle.

    make fuzz SECONDS=60
    PYTHONPATH=. python tests/fuzz.py --seconds 600 --seed 7 --kinds dense cached

They run on the kernels where there is a Hopper GPU, and through XLA elsewhere. The seed is printed
at the start. The first problem that fails is printed as a program that repeats it. While a problem
runs, its program is also in a temporary file, so that it survives a crash of the process.
"""

import argparse
import dataclasses
import itertools
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cached
import contract
import dense
import scores
from case import Case
from jax_fa3 import dot_product_attention, route

RUNNING = Path(tempfile.gettempdir()) / "jax_fa3_fuzz.py"
KERNEL_DIMS = ((64, None), (96, None), (128, None), (192, 128), (256, None), (80, 40))
INT32 = np.iinfo(np.int32)


# ---- lengths and offsets of any value


def draw_values(number):
    """A case whose lengths and offsets are any int32."""
    rng = np.random.default_rng([11, number])
    seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, 150, 2))
    case = Case(
        batch=3,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=4,
        heads_kv=int(rng.choice([1, 2, 4])),
        head_dim=int(rng.choice([32, 64, 128])),
        causal=bool(rng.integers(2)),
        window=(int(rng.integers(99)), int(rng.integers(99))) if rng.integers(2) else None,
    )
    return with_any_values(case, rng)


def with_any_values(case, rng):
    """Lengths and offsets for each sequence: near the extents, the ends of int32 or between."""

    def values(n):
        any_value = rng.integers(INT32.min, INT32.max, endpoint=True)
        near = rng.integers(-9, n + 9, 2)
        return int(rng.choice([any_value, rng.choice([INT32.min, INT32.max]), *near]))

    drawn = {
        name: tuple(values(extent) for _ in range(case.batch))
        for name, extent in (
            ("query_lengths", case.seqlen_q),
            ("key_lengths", case.seqlen_k),
            ("offset", case.seqlen_k),
        )
    }
    return dataclasses.replace(case, **drawn)


def check_values(implementation, case):
    """Lengths mean their nearest legal value, and offsets what they say."""

    def legal(lengths, extent):
        return tuple(np.clip(lengths, 0, extent).tolist())

    meant = dataclasses.replace(
        case,
        query_lengths=legal(case.query_lengths, case.seqlen_q),
        key_lengths=legal(case.key_lengths, case.seqlen_k),
    )
    inputs = contract.spoil_padding(meant, case.inputs())
    contract.compare(meant, inputs, implementation.run(case, inputs))


# ---- illegal calls

NO_OPTION = {  # values that an option does not have
    "scale": ("large", 1j, (1.0, 2.0)),
    "local_window_size": (-1, (3, -2), (1, 2, 3), 2.5, "left"),
    "logits_soft_cap": (-1.0, 0.0, "low"),
    "attention_chunk": (0, -64, 1.5),
    "implementation": ("triton", 3),
    "sm_margin": (-1, 0.5),
}
ARRAYS = (
    "query", "key", "value", "bias", "mask", "query_seq_lengths", "key_value_seq_lengths",
    "query_offset", "query_segment_ids", "kv_start", "kv_end", "sinks", "alibi_slopes",
)  # fmt: skip
CHANGES = ("dtype", "dimension", "extent")


@dataclasses.dataclass(frozen=True)
class Illegal:
    """A call in which one argument is wrong: an option's value, or an array's `change`."""

    argument: str
    change: Any
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int

    @property
    def name(self):
        return f"{self.argument}-{self.change}"

    def arguments(self):
        rows, keys = (self.batch, self.seqlen_q), (self.batch, self.seqlen_k)
        query, key = (np.zeros((*x, self.heads, 32), "bfloat16") for x in (rows, keys))
        call = dict(query=query, key=key, value=key)
        if self.argument in NO_OPTION:
            return call | {self.argument: self.change}
        scores = (self.batch, self.heads, self.seqlen_q, self.seqlen_k)
        lengths, places = np.ones(self.batch, np.int32), np.ones(rows, np.int32)
        arrays = dict(
            bias=np.zeros(scores, "bfloat16"),
            mask=np.ones(scores, bool),
            query_segment_ids=places,
            key_value_segment_ids=np.ones(keys, np.int32),
            kv_start=places,
            kv_end=places,
            **dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), lengths),
            query_offset=lengths,
            **dict.fromkeys(("sinks", "alibi_slopes"), np.zeros(self.heads, np.float32)),
        )
        x = (call | arrays)[self.argument]
        if self.change == "dtype":
            x = x.astype(np.float32 if x.dtype in (bool, np.int32) else np.int16)
        elif self.change == "dimension":
            x = x[(None,) * (6 - x.ndim)]
        else:
            # Value may have a head_dim of its own.
            x = np.concatenate([x, x, x], axis=1 if self.argument == "value" else -1)
        if self.argument == "query_segment_ids":
            call["key_value_segment_ids"] = arrays["key_value_segment_ids"]
        return call | {self.argument: x}


def draw_illegal(number):
    rng = random.Random(number)
    argument = rng.choice([*ARRAYS, *NO_OPTION])
    change = rng.choice(NO_OPTION.get(argument, CHANGES))
    sizes = (rng.randint(1, 3), rng.randint(2, 90), rng.randint(2, 90), rng.randint(1, 4))
    return Illegal(argument, change, *sizes)


def check_illegal(implementation, call):
    """A Python error that names the argument; under jax.jit too, as here."""
    arguments = call.arguments()
    options = {x: arguments.pop(x) for x in NO_OPTION if x in arguments}
    try:
        jax.eval_shape(lambda arrays: dot_product_attention(**arrays, **options), arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        words = str(error)
        assert call.argument in words, f"the message does not name {call.argument}: {words}"
        return
    raise AssertionError(f"no error for {call}")


# ---- all kinds


def draw_cached(number):
    dims = dict(head_dims=KERNEL_DIMS) if route.device_reason() is None else {}
    return cached.random_case(number, **dims)


def check_cached(implementation, case):
    problem = cached.Problem(case)
    cached.check(problem, cached.attend(problem, implementation.name))


@dataclasses.dataclass(frozen=True)
class Kind:
    """draw(number) gives a problem whose repr is an expression; check(implementation, problem)
    raises where a call is wrong. So many `in_turn` are checked before the next kind."""

    draw: Callable[[int], Any]
    check: Callable[[contract.Implementation, Any], None]
    in_turn: int = 1


KINDS = {
    "dense": Kind(dense.random_case, dense.check),
    "scores": Kind(scores.random_case, dense.check),
    "cached": Kind(draw_cached, check_cached),
    "values": Kind(draw_values, check_values),
    "illegal": Kind(draw_illegal, check_illegal, in_turn=40),
}


def implementation_here():
    """The kernels where they run, as the one implementation under test; else XLA."""
    return contract.Implementation("fa3" if route.device_reason() is None else "xla")


def program(kind, implementation, problem):
    """The text of a Python program that repeats the check of one problem."""
    name, folder = type(problem).__name__, Path(__file__).resolve().parent
    module = type(problem).__module__.replace("__main__", "fuzz")
    return (
        f"import sys\n\nsys.path[:0] = [{str(folder.parent)!r}, {str(folder)!r}]\n"
        f"import contract\nimport fuzz\nfrom {module} import {name}\n\n"
        f"implementation = contract.Implementation({implementation.name!r})\n"
        f"fuzz.KINDS[{kind!r}].check(implementation, {problem!r})\n"
    )


def fuzz(kinds, seed, seconds, log=print):
    """Checks problems of these kinds turn by turn until time is out or one fails. Returns how many
    of each kind passed, and the program of the one that failed, or None."""
    rng, passed, start = random.Random(seed), Counter(), time.monotonic()
    turn = [kind for kind in kinds for _ in range(KINDS[kind].in_turn)]
    for kind in itertools.cycle(turn):
        if time.monotonic() - start > seconds:
            return passed, None
        problem = KINDS[kind].draw(rng.randrange(1 << 31))
        implementation = implementation_here()
        text = program(kind, implementation, problem)
        RUNNING.write_text(text)
        try:
            KINDS[kind].check(implementation, problem)
        except Exception:
            log(traceback.format_exc())
            return passed, text
        passed[kind] += 1
        if passed.total() % len(turn) == 0:
            jax.clear_caches()  # no program is met again


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="start nothing new after these")
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 31) if args.seed is None else args.seed
    print(
        f"seed {seed}, {implementation_here().name} on {jax.devices()[0].device_kind}; "
        f"the running problem is in {RUNNING}",
        flush=True,
    )
    passed, failed = fuzz(args.kinds, seed, args.seconds)
    print(", ".join(f"{count} {kind}" for kind, count in passed.items()) + " passed")
    if failed:
        print(f"FAILED with seed {seed}; this program repeats it:\n\n{failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
