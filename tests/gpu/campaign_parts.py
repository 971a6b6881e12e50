"""The parts of the campaign: what each checks, and how often."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import cached
import contract
import dense
import fuzz
import scores
import tolerance
from jax_fa3 import cached_attention, dot_product_attention, route

IS_HOPPER = route.device_reason() is None
IMPLEMENTATION = fuzz.implementation_here()

Verdicts = Iterator[tuple[int, str | None]]  # so many checks, and why one of them failed


@dataclasses.dataclass(frozen=True)
class Part:
    """run(task, checks) makes so many checks of a task; `goal` is their number in all tasks. What
    fills memory or measures its own process runs alone."""

    name: str
    about: str
    unit: str
    goal: int
    tasks: int
    run: Callable[[int, int], Verdicts]
    needs_gpu: bool = False
    alone: bool = False

    @property
    def checks_of_a_task(self):
        return -(-self.goal // self.tasks)

    def scaled(self, share):
        """The part with a share of each task's checks, at least one."""
        checks = max(1, int(share * self.checks_of_a_task))
        return self if share == 1 else dataclasses.replace(self, goal=checks * self.tasks)


def verdict(check, *x):
    """None where check(*x) passes, or else what it raised."""
    try:
        check(*x)
    except Exception:
        return f"of {x[-1]!r}: {traceback.format_exc()}"
    return None


@contextlib.contextmanager
def named(case):
    """Errors say which case they are of, as an expression."""
    try:
        yield
    except Exception as error:
        error.add_note(repr(case))
        raise


def of_each(check, task, checks) -> Verdicts:
    """check(number) for each number of a task."""
    for number in range(task * checks, (task + 1) * checks):
        yield 1, verdict(check, number)


# ---- random problems of one compiled shape


def problem_of(task):
    """Biases and masks, or sinks, caps and slopes, by turns."""
    draw = (dense.random_case, scores.random_case)[task % 2]
    return draw(task // 2)


def vary(case, number):
    """Other values in everything that is an array of the call."""
    rng = np.random.default_rng([13, number])

    def lengths(given, extent):
        return given and tuple(rng.integers(0, extent + 1, case.batch).tolist())

    def documents():
        ends = np.sort(rng.integers(0, case.seqlen_q + 1, 6))
        return tuple(np.diff(ends, prepend=0).tolist())

    offset = case.offset
    if isinstance(offset, tuple):
        offset = tuple(rng.integers(-case.seqlen_q, case.seqlen_k, case.batch).tolist())
    return dataclasses.replace(
        case,
        seed=number + 1,
        query_lengths=lengths(case.query_lengths, case.seqlen_q),
        key_lengths=lengths(case.key_lengths, case.seqlen_k),
        offset=offset,
        documents=case.documents and tuple(documents() for _ in range(case.batch)),
    )


def compile_forward(case):
    """Output, LSE and largest logits, as a dictionary, of what dense.operands gives."""

    def results(query, key, value, dout, dlse, bias, mask, index, heads):
        attend = functools.partial(case.attend, IMPLEMENTATION.name)
        got = attend(query, key, value, bias, mask, index, heads)
        return dict(zip(("out", "lse", "max_logits"), got, strict=False))

    return jax.jit(results).lower(*dense.operands(case)).compile()


def compare_forward(case, inputs, got):
    exact, same = (case.reference(inputs, precision) for precision in ("exact", case.dtype))
    for name, x in got.items():
        tolerance.check(name, np.asarray(x), getattr(exact, name), getattr(same, name))
    assert not np.any(np.asarray(got["out"])[case.blind]), "out is not zero where it must be"


def run_case(executable, case):
    """The results, with NaN and infinities wherever nobody looks."""
    inputs = contract.spoil_padding(case, case.inputs())
    return inputs, executable(*dense.operands(case, inputs, case.spoiled_bias))


def forward(task, checks):
    case = problem_of(task)
    executable = compile_forward(case)

    def check(number):
        varied = vary(case, number)
        with named(varied):
            compare_forward(varied, *run_case(executable, varied))

    yield from of_each(check, task, checks)


def backward(task, checks):
    case = problem_of(task)
    executable = dense.compile_call(IMPLEMENTATION, case)

    def check(number):
        varied = vary(case, number)
        with named(varied):
            inputs, got = run_case(executable, varied)
            contract.compare(varied, inputs, contract.as_results(got))

    yield from of_each(check, task, checks)


def poison(task, checks):
    """NaN and infinities in padding change no bit of any result."""
    case = dataclasses.replace(problem_of(task), deterministic=True)
    lengths = dict(query_lengths=(1,) * case.batch, key_lengths=(1,) * case.batch)
    case = dataclasses.replace(case, **lengths)  # `vary` draws them
    executable = dense.compile_call(IMPLEMENTATION, case)

    def check(number):
        varied = vary(case, number)
        with named(varied):
            clean = executable(*dense.operands(varied))
            _, spoiled = run_case(executable, varied)
            for name, x in clean.items():
                assert np.asarray(x).tobytes() == np.asarray(spoiled[name]).tobytes(), name

    yield from of_each(check, task, checks)


# ---- index arrays of any value


class ProgramOf:
    """The program of one case, for others of its shapes and options."""

    def __init__(self, case):
        self.executable = IMPLEMENTATION.compile(case)

    def run(self, case, inputs):
        got = self.executable(*inputs, case.index_arrays, case.head_arrays)
        return contract.as_results(got)


def hostile(task, checks):
    """Any int32 as lengths and offsets: each means its nearest legal value."""
    case = fuzz.draw_values(task)
    program = ProgramOf(case)

    def check(number):
        varied = fuzz.with_any_values(case, np.random.default_rng([17, number]))
        with named(varied):
            fuzz.check_values(program, varied)

    yield from of_each(check, task, checks)


def pages(task, checks):
    """Any int32 in lengths, offsets and page tables of caches: other sequences keep their bits."""
    counts = None if task % 2 else (2, 0, 3, 1)
    sizes = dict(heads_q=8, head_dim=128, dtype="bfloat16", page_size=16, width=8)
    name = IMPLEMENTATION.name
    run = jax.jit(functools.partial(cached_attention, implementation=name, return_residual=True))

    def check(seed):
        cached.check_hostile(run, seed, counts=counts, **sizes)

    yield from of_each(check, task, checks)


# ---- execution


def chain(query, key, value, length=10):
    """So many launches in a row."""
    for _ in range(length):
        query = dot_product_attention(
            query, key, value, is_causal=True, implementation=IMPLEMENTATION.name
        )
    return query


def chain_gradient(query, key, value):
    def loss(*x):
        return jnp.sum(jnp.sin(chain(*x).astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


def small_inputs(seed, head_dim=64, seqlen=200):
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (4, 2, 2)
    return [
        jax.random.normal(key, (2, seqlen, h, head_dim), jnp.bfloat16)
        for key, h in zip(keys, heads, strict=True)
    ]


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def replay(task, checks):
    """A captured program on inputs at other addresses, against one that is not captured."""
    head_dim = (64, 128, 256)[task % 3]
    deterministic = functools.partial(dot_product_attention, is_causal=True, deterministic=True)

    def six(query, key, value):
        for _ in range(6):
            query = deterministic(query, key, value)
        return query

    def gradient(*x):
        return jax.grad(lambda *y: jnp.sum(six(*y).astype(jnp.float32)), argnums=(0, 1, 2))(*x)

    function = gradient if task % 2 else six
    plain = jax.jit(function, compiler_options={"xla_gpu_enable_command_buffer": ""})
    captured, kept, addresses = jax.jit(function), [], set()
    for number in range(checks):
        inputs = small_inputs(number, head_dim)
        kept = [*kept[-7:], inputs]  # the next ones lie elsewhere
        addresses.add(inputs[0].unsafe_buffer_pointer())
        same = bits(captured(*inputs)) == bits(plain(*inputs))
        yield 1, None if same else f"replay {number}: other bits than without a command buffer"
    if checks > 8 and len(addresses) < 8:
        yield 1, f"inputs were at {len(addresses)} addresses only"


def soak(task, checks):
    """Equal bits in every launch, and no growth of memory on device and host."""
    inputs, launches = small_inputs(task), 10
    want = jax.jit(chain)(*inputs)

    @jax.jit
    def step(differ, want, *x):
        got = chain(*x, length=launches)
        got, want = (lax.bitcast_convert_type(y, jnp.uint16) for y in (got, want))
        return differ + jnp.any(got != want)

    differ = step(jnp.int32(0), want, *inputs)
    gc.collect()
    before = memory()
    for _ in range(-(-checks // launches)):
        differ = step(differ, want, *inputs)
    differ = int(differ)
    gc.collect()
    growth = {name: x - before[name] for name, x in memory().items() if x - before[name] > 1 << 24}
    yield checks, f"{differ} runs of {launches} launches had other bits" if differ else None
    yield 0, f"memory grew by {growth} bytes" if growth else None


def memory():
    """Bytes in use by this process, and on the device where it tells."""
    pages_in_use = int(Path("/proc/self/statm").read_text().split()[1])
    found = dict(host=pages_in_use * os.sysconf("SC_PAGE_SIZE"))
    if stats := jax.devices()[0].memory_stats():
        found["device"] = stats["bytes_in_use"]
    return found


def threads(task, checks):
    """Four host threads, each with programs of its own: the bits of one thread alone."""
    programs = [jax.jit(functools.partial(chain, length=n)) for n in (1, 2, 3, 4)]
    operands = [small_inputs(task, d, n) for d, n in ((64, 200), (128, 90), (64, 333), (256, 65))]
    want = [bits(run(*x)) for run, x in zip(programs, operands, strict=True)]
    failures = [[] for _ in programs]

    def work(i):
        for number in range(checks // len(programs)):
            if bits(programs[i](*operands[i])) != want[i]:
                failures[i].append(f"thread {i}, call {number}: other bits than alone")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(programs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    yield checks, None
    yield from ((0, failure) for failure in itertools.chain(*failures))


# ---- errors


def expect_error(function, words):
    """None where function() raises JAX's runtime error with one of the words."""
    try:
        jax.block_until_ready(function())
    except jax.errors.JaxRuntimeError as error:
        found = any(word in str(error) for word in words)
        return None if found else f"expected one of {words}, got {error}"
    return f"no error, expected one of {words}"


def usable(want, inputs):
    same = bits(jax.jit(chain)(*inputs)) == want
    return None if same else "the next call had other bits"


def fill_memory():
    """Arrays that leave less than 64 MiB of the device's memory."""
    blocks = []
    for size in (1 << 32, 1 << 29, 1 << 26):
        while True:
            try:
                blocks.append(jax.block_until_ready(jnp.zeros(size, jnp.uint8)))
            except jax.errors.JaxRuntimeError:
                break
    return blocks


def out_of_memory(task, checks):
    """Results that do not fit: RESOURCE_EXHAUSTED, and the next call is right."""
    few = small_inputs(0)
    want = bits(jax.jit(chain)(*few))
    many = small_inputs(1, head_dim=128, seqlen=1 << 18)  # results of 256 MiB and more
    run = jax.jit(chain_gradient if task % 2 else functools.partial(chain, length=1))
    run = run.lower(*many).compile()
    for _ in range(checks):
        blocks = fill_memory()
        failure = expect_error(lambda: run(*many), ["RESOURCE_EXHAUSTED"])
        del blocks
        yield 1, failure or usable(want, few)


def _operand(change):
    return lambda results, arrays, attributes: (results, change(list(arrays)), attributes)


def _option(name, value):
    def damage(results, arrays, attributes):
        return results, arrays, attributes | dict(options=attributes["options"] | {name: value})

    return damage


def _without_option(name):
    def damage(results, arrays, attributes):
        options = {key: x for key, x in attributes["options"].items() if key != name}
        return results, arrays, attributes | dict(options=options)

    return damage


def _named_otherwise(results, arrays, attributes):
    return (
        results,
        arrays,
        attributes | dict(operands=attributes["operands"].replace("key", "keys")),
    )


def _smaller_workspace(results, arrays, attributes):
    *others, last = results
    shape = (0,) if last.shape[0] == 1 else (1,)
    return [*others, jax.ShapeDtypeStruct(shape, last.dtype)], arrays, attributes


DAMAGES = {  # what Python never lets through to the handlers
    "an operand less": _operand(lambda x: x[:-1]),
    "an operand more": _operand(lambda x: [*x, x[0]]),
    "query in float32": _operand(lambda x: [x[0].astype(jnp.float32), *x[1:]]),
    "key in another type": _operand(lambda x: [x[0], x[1].astype(jnp.float16), *x[2:]]),
    "fewer keys than values": _operand(lambda x: [x[0], x[1][:, 1:], *x[2:]]),
    "key of another batch": _operand(lambda x: [x[0], x[1][:1], *x[2:]]),
    "query of three dimensions": _operand(lambda x: [x[0][0], *x[1:]]),
    "value of another number of heads": _operand(lambda x: [*x[:2], x[2][:, :, :1], *x[3:]]),
    "no workspace": _smaller_workspace,
    "scale NaN": _option("scale", np.float32("nan")),
    "scale infinite": _option("scale", np.float32("inf")),
    "sm_margin negative": _option("sm_margin", np.int32(-1)),
    "scale of another type": _option("scale", np.float64(1)),
    "no scale": _without_option("scale"),
    "another name": _named_otherwise,
}


def damaged(target, damage):
    """jax.ffi.ffi_call, with the damage in the calls of a target."""
    real = jax.ffi.ffi_call

    def ffi_call(called, results, **options):
        if called != target:
            return real(called, results, **options)

        def call(*arrays, **attributes):
            changed, arrays, attributes = damage(list(results), arrays, attributes)
            got = real(called, changed, **options)(*arrays, **attributes)
            # What follows takes results of the right shapes.
            largest = [jnp.max(x).astype(jnp.float32) for x in got if x.size]
            return [jnp.full(x.shape, sum(largest)).astype(x.dtype) for x in results]

        return call

    return ffi_call


def faults(task, checks):
    """Calls that were damaged between Python and the handlers: an error of the custom call, and
    the next call is right. Even tasks damage the forward, odd ones the backward call."""
    inputs = small_inputs(0)
    want = bits(jax.jit(chain)(*inputs))
    target = ("jax_fa3_forward", "jax_fa3_backward")[task % 2]
    name, damage = list(DAMAGES.items())[task // 2]
    jax.clear_caches()  # traces of the right calls, and in the end those of the damaged ones
    with mock.patch.object(jax.ffi, "ffi_call", damaged(target, damage)):
        run = jax.jit(chain_gradient if task % 2 else functools.partial(chain, length=1))
        words = ["INVALID_ARGUMENT", "UNIMPLEMENTED", "INTERNAL", "FAILED_PRECONDITION"]
        failure = expect_error(lambda: run(*inputs), words)
    jax.clear_caches()
    yield 1, failure and f"{name}, {target}: {failure}"
    yield 0, usable(want, inputs)


def sizes(task, checks):
    """More than 2^31 elements of every array; a batch of 70,000."""
    import test_sizes

    tests = (test_sizes.test_many_sequences, test_sizes.test_many_keys, test_sizes.test_many_pairs)
    yield 1, verdict(lambda test: test(), tests[task])


def functions(task, checks):
    """Functions of scores and masks that are drawn, forward and backward, with float64."""
    import flex_checks

    for number in range(1000 + checks * task, 1000 + checks * (task + 1)):
        failure = verdict(flex_checks.check_random, number)
        yield 1, failure and f"function {number}: {failure}"
    jax.clear_caches()


PARTS = (
    Part("forward", "outputs against the oracle", "problems", 20_000, 400, forward),
    Part("backward", "outputs and gradients against the oracle", "problems", 10_000, 400, backward),
    Part("functions", "drawn score and mask functions", "functions", 200, 20, functions, True),
    Part("poison", "NaN and infinities in padding change no bit", "cases", 1_000, 40, poison),
    Part("hostile", "any int32 as lengths and offsets", "triples", 2_000, 20, hostile),
    Part("pages", "any int32 in the index arrays of caches", "cases", 1_000, 10, pages),
    Part("replay", "command buffers on moved inputs", "replays", 1_000, 10, replay, True),
    Part(
        "out of memory",
        "an error, and a right next call",
        "calls",
        100,
        10,
        out_of_memory,
        needs_gpu=True,
        alone=True,
    ),
    Part(
        "faults", "damaged custom calls: an error, a right next call", "calls", 30, 30, faults, True
    ),
    Part(
        "sizes", "more than 2^31 elements; a batch of 70,000", "problems", 3, 3, sizes, True, True
    ),
    Part("soak", "equal bits, no growth of memory", "launches", 1_000_000, 20, soak, alone=True),
    Part("threads", "four host threads at a time", "calls", 10_000, 10, threads, alone=True),
)
