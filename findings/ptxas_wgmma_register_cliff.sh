#!/usr/bin/env bash
# One register fewer than a WGMMA loop needs makes ptxas spill a whole accumulator and serialize,
# and the need is 26 registers above what the WGMMA operands occupy.
#
# Version: ptxas 13.0.88 (nvidia-cuda-nvcc), sm_90a; compiles only. 13.5.37 gives the same numbers.
# Expected: a kernel whose live values fit under .maxnreg does not spill; below that point, spills
#   grow a register at a time, as they do in code without WGMMA.
# Seen: a kernel with one m64nNk16 accumulator and nothing else needs N/2 + 26 registers, for each
#   N; with one fewer, ptxas gives up (C7602). An attention-like loop (scores S in 64 registers,
#   weights P as a register operand in 32, output O in 64) needs exactly 64 + 64 + 26 = 154 if P is
#   made and used in one iteration, since P takes the place of S. At 153 it does not spill one
#   register but stores 512 bytes, and C7512 serializes the pipeline. If P crosses the back edge, so
#   that the next scores run beside P V, it needs exactly 64 + 64 + 32 + 26 = 186; at 185 it spills
#   and is serialized. Code without WGMMA that keeps the same 128 floats alive fits with more than
#   ten registers fewer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check --no-deps nvidia-cuda-nvcc==13.0.88
venv/bin/python - venv/lib/python3*/site-packages/nvidia/cu13/bin/ptxas <<'PYTHON'
import re
import subprocess
import sys

FENCE = "wgmma.fence.sync.aligned;"
COMMIT = "wgmma.commit_group.sync.aligned;"
S = [f"s{i}" for i in range(128)]
P = [f"p{i}" for i in range(64)]
O = [f"o{i}" for i in range(128)]  # noqa: E741


def wait(groups):
    return f"wgmma.wait_group.sync.aligned {groups};"


def wgmma(out, left, accumulate="yes"):
    """out += left right; left is four registers or a descriptor."""
    shape = f"m64n{2 * len(out)}k16.f32.bf16.bf16"
    registers = isinstance(left, list)
    return (f"wgmma.mma_async.sync.aligned.{shape} {{{', '.join(out)}}}, "
            f"{'{' + ', '.join(left) + '}' if registers else left}, right, {accumulate}, 1, 1, "
            + ("0;" if registers else "0, 0;"))


def loop(body):
    return ["mov.b32 i, 0;", "again:", *body, "add.u32 i, i, 1;", "setp.lt.u32 more, i, n;",
            "@more bra again;"]


def zero(out):
    return [f"mov.f32 {x}, 0f00000000;" for x in out]


def store(out):
    return [f"st.global.f32 [address + {4 * i}], {x};" for i, x in enumerate(out)]


def compile_(body, limit):
    lines = [
        ".version 8.7", ".target sm_90a", ".address_size 64",
        ".visible .entry kernel(.param .u64 to, .param .u64 l, .param .u64 r, .param .u32 count)",
        f".maxntid 128 .maxnreg {limit}", "{",
        ".reg .f32 s<128>, o<128>;", ".reg .b32 p<64>, i, n, thread;", ".reg .pred more, yes, no;",
        ".reg .b64 address, offset, left, right;",
        "ld.param.u64 address, [to];", "ld.param.u64 left, [l];", "ld.param.u64 right, [r];",
        "ld.param.u32 n, [count];", "mov.u32 thread, %tid.x;", "mul.wide.u32 offset, thread, 1024;",
        "add.u64 address, address, offset;", "setp.eq.u32 yes, 0, 0;", "setp.ne.u32 no, 0, 0;",
        *body, "ret;", "}", "",
    ]
    with open("kernel.ptx", "w") as file:
        file.write("\n".join(lines))
    run = subprocess.run([sys.argv[1], "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"],
                         capture_output=True, text=True)
    if run.returncode:
        assert "(C7602)" in run.stderr, run.stderr
        return "C7602"
    spill = int(re.search(r"(\d+) bytes spill stores", run.stderr)[1])
    used = int(re.search(r"Used (\d+) registers", run.stderr)[1])
    return used, spill, "(C7512)" in run.stderr


def attention(carried):
    s, p, o = S[:64], P[:32], O[:64]
    scores = [FENCE, *(wgmma(s, "left", "no" if k == 0 else "yes") for k in range(4)), COMMIT]
    output = [FENCE, *(wgmma(o, p[4 * k : 4 * k + 4]) for k in range(8)), COMMIT]
    weights = [f"ex2.approx.ftz.f32 {x}, {x};" for x in s]
    weights += [f"cvt.rn.bf16x2.f32 {x}, {s[2 * i + 1]}, {s[2 * i]};" for i, x in enumerate(p)]
    if carried:
        first = [*scores, wait(0), *weights]
        body = first + loop([*scores, *output, wait(1), wait(0), *weights]) + [*output, wait(0)]
    else:
        body = loop([*scores, wait(0), *weights, *output, wait(0)])
    return zero(o) + body + store(o)


for n in (8, 64, 128, 256):
    acc = O[: n // 2]
    body = zero(acc) + loop([FENCE, wgmma(acc, "left"), COMMIT, wait(0)]) + store(acc)
    enough, fewer = compile_(body, n // 2 + 26), compile_(body, n // 2 + 25)
    print(f"one m64n{n}k16: limit {n // 2 + 26}: {enough}, limit {n // 2 + 25}: {fewer}")
    assert enough == (n // 2 + 26, 0, False) and fewer == "C7602"

for carried, need, stored in ((False, 154, 512), (True, 186, 48)):
    for limit in (need, need - 1):
        used, spill, serialized = compile_(attention(carried), limit)
        print(f"P {'carried' if carried else 'in one iteration'}, limit {limit}: {used} registers, "
              f"{spill} bytes of spill stores, serialized: {serialized}")
        if limit == need:
            assert (used, spill, serialized) == (need, 0, False)
        else:
            assert (spill, serialized) == (stored, True)

values = O
plain = [f"ld.global.f32 {x}, [left + {4 * i}];" for i, x in enumerate(values)]
plain += loop([f"fma.rn.f32 {x}, {x}, {x}, {values[i - 1]};" for i, x in enumerate(values)])
used, spill, _ = compile_(plain + store(values), 144)
print(f"128 floats without WGMMA, limit 144: {used} registers, {spill} bytes of spill stores")
assert spill == 0 and used <= 144
PYTHON
