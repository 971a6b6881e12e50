#!/usr/bin/env bash
# NVRTC with --ftz=true flushes denormal numbers in instructions, but not in expressions that it
# evaluates itself: an expression changes its value when its operands become constants.
#
# Version: nvidia-cuda-nvrtc 13.0.88, compute_90a; compiles only, no GPU. 13.5.37 does the same.
# Expected: with --ftz=true (and --use_fast_math, which includes it) a denormal operand or result of
#   a float32 operation is zero of its sign, at compile time as at run time.
# Seen: `a * 1e-10f` becomes mul.ftz.f32, which is 0 for a = 1e-30f. With a literal 1e-30f, the same
#   product is the constant 0x000116C2, 1e-40, as without the option. expf(-90.f) and 1.f / 3e38f /
#   10.f are denormal constants, sqrtf(1e-40f) is 1e-20, and the branch for 1e-40f == 0.f is
#   removed, although the comparison instruction for the same number in a register flushes it.
#   log2f(1e-40f) is evaluated too, but flushes: it is -inf. __fmul_rn of the same literals is not
#   evaluated and stays an instruction that flushes. A number that moves from an argument to a
#   template parameter or constexpr can therefore change a result.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check --no-deps nvidia-cuda-nvrtc==13.0.88
venv/bin/python - venv/lib/python3*/site-packages/nvidia/cu13/lib <<'PYTHON'
import ctypes
import re
import struct
import sys

ctypes.CDLL(f"{sys.argv[1]}/libnvrtc-builtins.so.13.0", mode=ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(f"{sys.argv[1]}/libnvrtc.so.13")


def ptx(expression, *options):
    source = f'extern "C" __global__ void kernel(float* out, float a) {{ out[0] = {expression}; }}'
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [b"-arch=compute_90a", *(x.encode() for x in options)]
    assert not nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    array = (ctypes.c_char_p * len(options))(*options)
    assert not nvrtc.nvrtcCompileProgram(program, len(options), array)
    assert not nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    assert not nvrtc.nvrtcGetPTX(program, text)
    return text.value.decode()


def constant(text):
    """The number that is stored, if it is a constant."""
    stored = re.search(r"st\.global\.u32\s+\[%rd\d+\], (%r\d+)", text)
    found = stored and re.search(rf"mov\.[bu]32\s+{stored[1]}, (-?\d+);", text)
    return struct.unpack("f", struct.pack("I", int(found[1]) & 0xFFFFFFFF))[0] if found else None


for option in ("--ftz=true", "--use_fast_math"):
    for expression, instruction in (
        ("a * 1e-10f", "mul.ftz.f32"),
        ("__fmul_rn(1e-30f, 1e-10f)", "mul.rn.ftz.f32"),
        ("a == 0.f ? 5.f : 6.f", "setp.eq.ftz.f32"),
    ):
        text = ptx(expression, option)
        print(f"{option} {expression}: {instruction}")
        assert instruction in text and constant(text) is None

for expression, expected in (
    ("1e-30f * 1e-10f", 1e-40),
    ("1e-40f + 0.f", 1e-40),
    ("fminf(1e-40f, 1.f)", 1e-40),
    ("1.f / 3e38f / 10.f", 1 / 3e39),
    ("1e-40f == 0.f ? 5.f : 6.f", 6),
    ("log2f(1e-40f)", float("-inf")),
):
    got, plain = constant(ptx(expression, "--ftz=true")), constant(ptx(expression))
    print(f"{expression}: {got:g} with --ftz=true, {plain} without")
    assert got == expected or abs(got - expected) < 1e-44
    assert (plain == got) == (got != float("-inf"))
for expression, expected in (("expf(-90.f)", 8.19e-40), ("sqrtf(1e-40f)", 1e-20)):
    got = constant(ptx(expression, "--ftz=true"))
    print(f"{expression}: {got:g} with --ftz=true")
    assert abs(got / expected - 1) < 1e-2
PYTHON
