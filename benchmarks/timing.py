"""An implementation compiled for one problem, and the two clocks.

Kernel time is the sum of the GPU kernels of a call as CUPTI reports them: no launch gaps, no host.
Wall time is that of calls issued back to back, divided by their number: what a program sees.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from benchmarks.implementations import Implementation
from benchmarks.problems import Problem, largest_error


def describe(error: BaseException, limit: int = 300) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def platform() -> str:
    """What to lower for: the default backend, as lowering names it."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class Program:
    """lower, compile, load, then `calls` of it are timed; a failure is kept in `error`."""

    def __init__(self, implementation: Implementation, problem: Problem, mode: str):
        self.implementation, self.problem, self.mode = implementation, problem, mode
        self.error: str | None = None
        self.clock_error: str | None = None  # why kernel times are missing
        self.relative_error: float | None = None
        self.wall_us: list[float] = []
        self.kernel_us: list[float] = []
        self.calls = 0

    @property
    def label(self) -> str:
        return f"{self.implementation.name}:{self.mode}:{self.problem.label}"

    @property
    def direction(self) -> str:
        """Which pass the kernels that are asked for belong to."""
        return self.mode

    def attempt(self, step, *args) -> None:
        if self.error is None:
            try:
                step(*args)
            except Exception as error:
                self.error = f"{step.__name__}: {describe(error)}"

    def lower(self, platform: str) -> None:
        """Backward is the VJP alone: its residuals come from a program that is not timed."""
        function = self.implementation.build(self.problem, self.mode)
        *qkv, dout = self.problem.shapes()
        qkv = jax.eval_shape(lambda *x: self.implementation.prepare(self.problem, *x), *qkv)
        beside = jax.eval_shape(lambda: self.implementation.beside(self.problem))
        self.dout_dtype = jax.eval_shape(function, *qkv, *beside).dtype
        dout = jax.ShapeDtypeStruct(dout.shape, self.dout_dtype)
        if self.mode == "forward":
            traced = [jax.jit(function).trace(*qkv, *beside)]
        else:

            @jax.jit
            def linearized(qkv, beside):
                return jax.vjp(lambda *x: function(*x, *beside), *qkv)[1]

            residuals = linearized.trace(qkv, beside)
            pullback = jax.jit(lambda pull, dout: pull(dout))
            traced = [residuals, pullback.trace(shapes_of(residuals.out_info), dout)]
        self.lowered = [x.lower(lowering_platforms=(platform,)) for x in traced]

    def expect_custom_call(self) -> None:
        """Raises unless lowering gave the custom call that the implementation must be."""
        target = self.implementation.target.format(mode=self.direction)
        if f"@{target}(" not in self.lowered[-1].as_text():
            raise LookupError(f"no call of {target} in the lowering")

    def compile(self) -> None:
        self.compiled = [x.compile() for x in self.lowered]

    def take(self, inputs: list[jax.Array]) -> None:
        """Query, key, value and dout, as this implementation wants them."""
        *qkv, dout = inputs
        qkv = self.implementation.prepare(self.problem, *qkv)
        beside = jax.tree.map(jnp.asarray, self.implementation.beside(self.problem))
        if self.mode == "forward":
            self.args = *qkv, *beside
        else:
            self.args = self.compiled[0](qkv, beside), dout.astype(self.dout_dtype)
        self.run = self.compiled[-1]

    def load(self, inputs: list[jax.Array], want) -> None:
        """Takes the inputs, checks the answer once and finds how many calls make a round."""
        self.take(inputs)
        self.relative_error = self.error_of(self.run(*self.args), want)
        if not self.relative_error <= self.implementation.tolerance:
            raise ArithmeticError(f"wrong result: relative error {self.relative_error:.1e}")
        self.calls = 3
        self.calls = int(min(1000, max(5, 4e4 / self.time_wall())))
        self.time_wall()

    def error_of(self, got, want) -> float:
        """The relative error of an answer, by what the problem's reference gave."""
        out, gradients = want
        if self.mode == "backward":
            return largest_error(got, self.implementation.expected(self.problem, gradients))
        return largest_error(got, out)

    def time_wall(self) -> float:
        """Microseconds a call, back to back."""
        start = time.perf_counter()
        for _ in range(self.calls):
            out = self.run(*self.args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / self.calls * 1e6

    def wall_round(self) -> None:
        self.wall_us.append(self.time_wall())

    def kernel_round(self, detach: bool) -> None:
        """Median over a few calls; `detach` takes the profiler out of the process again.

        A failure costs the kernel times only.
        """
        count = max(3, min(30, self.calls // 2))
        try:
            clock = profiler.Cupti(finalize=detach)
            _, times = clock.measure(self.run, iterations=count)(*self.args)
            self.kernel_us.append(statistics.median(times) * 1e3)
        except Exception as error:
            self.clock_error = describe(error)

    def release(self) -> None:
        """Drops the arrays and executables; the numbers stay."""
        self.args = self.run = self.lowered = self.compiled = None

    def record(self) -> dict:
        """The result as a row of the JSON file; times in microseconds, medians over rounds."""
        problem = self.problem
        row = dict(implementation=self.implementation.name, mode=self.mode, **vars(problem))
        row |= dict(error=self.error, clock_error=self.clock_error)
        row |= dict(relative_error=self.relative_error)
        for clock, rounds in (("kernel", self.kernel_us), ("wall", self.wall_us)):
            if rounds:
                median = statistics.median(rounds)
                row[f"{clock}_us"], row[f"{clock}_us_rounds"] = median, rounds
                row[f"{clock}_tflops"] = problem.flops(self.mode) / median / 1e6
        return row
