"""FlashAttention-2's kernels, as torch has them, timed in a process of their own.

benchmarks.attention starts this module where torch is installed: torch and JAX bring CUDA libraries
of their own, and reserve memory each. It reads {"rounds": N, "problems": [...]} as JSON from stdin
and prints a JSON line for each problem; the module imports no JAX.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import util

NAME = "FA2"
COMMAND = (sys.executable, "-m", "benchmarks.torch_attention")
TOLERANCE = 2e-2  # relative, as of the implementations in JAX


def absent() -> str | None:
    """Why the column is left out, or None."""
    return None if util.find_spec("torch") else "the package torch is not installed"


# ---- in the process of the benchmark


def records(
    problems: Iterable[tuple[object, str]],
    rounds: int,
    timeout_s: float,
    command: Sequence[str] | None = None,
    name: str = NAME,
) -> list[dict]:
    """Rows as timing.Program.record gives them, of (problem, mode) pairs; what the process does not
    come to has an error."""
    problems = list(problems)
    asked = [dict(vars(problem), mode=mode) for problem, mode in problems]
    lines, why = answers(command or COMMAND, dict(rounds=rounds, problems=asked), timeout_s)
    lines += [dict(error=why)] * (len(problems) - len(lines))
    return [
        _record(name, problem, mode, found)
        for (problem, mode), found in zip(problems, lines, strict=True)
    ]


def answers(
    command: Sequence[str], request: dict, timeout_s: float, **variables: str
) -> tuple[list[dict], str]:
    """The JSON lines that a process with more environment variables prints, and why there are no
    more of them."""
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=os.environ | variables,
        )
        printed, errors = done.stdout, done.stderr.strip().splitlines()
        why = errors[-1] if errors else "the process ended early"
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        printed = printed.decode() if isinstance(printed, bytes) else printed
        why = f"out of time after {timeout_s:.0f} s"
    return [json.loads(line) for line in printed.splitlines() if line.endswith("}")], why


def _record(name: str, problem, mode: str, found: dict) -> dict:
    row = dict(implementation=name, mode=mode, **vars(problem), error=found.get("error"))
    row |= dict(clock_error=None, relative_error=found.get("relative_error"))
    for clock in ("kernel", "wall"):
        if rounds := found.get(f"{clock}_us"):
            median = statistics.median(rounds)
            row[f"{clock}_us"], row[f"{clock}_us_rounds"] = median, rounds
            row[f"{clock}_tflops"] = problem.flops(mode) / median / 1e6
    return row


# ---- in the process of torch


def measure(torch, problem: dict, rounds: int) -> dict:
    """Microseconds of each round by both clocks, and the error against float32."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    shape = [problem[name] for name in ("batch", "seqlen", "heads", "head_dim")]
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16)[problem["dtype"]]
    # [batch, seqlen, heads, head_dim] in memory, as the others have them.
    arrays = [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4)]
    *qkv, dout = arrays
    is_backward = problem["mode"] == "backward"

    def attend(backend, qkv):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*qkv, is_causal=problem["causal"])

    def linearized(backend, qkv):
        """Leaves to differentiate for, and the output."""
        leaves = [x.detach().requires_grad_() for x in qkv]
        return leaves, attend(backend, leaves)

    def results(backend, qkv, dout):
        if not is_backward:
            return [attend(backend, qkv)]
        leaves, out = linearized(backend, qkv)
        return torch.autograd.grad(out, leaves, dout)

    # A head of one sequence, which others do not change.
    one = [x[:1, :1] for x in arrays]
    got = results(SDPBackend.FLASH_ATTENTION, one[:3], one[3])
    exact = [x.float() for x in one]
    want = results(SDPBackend.MATH, exact[:3], exact[3])
    error = max(float((x.float() - y).norm() / y.norm()) for x, y in zip(got, want, strict=True))
    if not error <= TOLERANCE:
        return dict(error=f"wrong result: relative error {error:.1e}")

    if is_backward:
        leaves, out = linearized(SDPBackend.FLASH_ATTENTION, qkv)

        def call():
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
    else:

        def call():
            attend(SDPBackend.FLASH_ATTENTION, qkv)

    return clocks(torch, call, rounds) | dict(relative_error=error)


def clocks(torch, call: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, of each round, by both clocks."""
    wall, kernel, calls = [], [], 3
    for number in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        each = (time.perf_counter() - start) / calls * 1e6
        if number == 0:  # warms up, and says how many calls make a round
            calls = int(min(1000, max(5, 4e4 / each)))
            continue
        wall.append(each)
        count = max(3, min(30, calls // 2))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(count):
                call()
            torch.cuda.synchronize()
        total = sum(event.self_device_time_total for event in profile.key_averages())
        kernel.append(total / count)
    return dict(wall_us=wall, kernel_us=kernel)


def main(measure: Callable[..., dict] = measure) -> int:
    """Answers for each problem by measure(torch, problem, rounds)."""
    import torch

    request = json.load(sys.stdin)
    for problem in request["problems"]:
        try:
            found = measure(torch, problem, request["rounds"])
        except Exception as error:
            found = dict(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
