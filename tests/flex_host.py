"""The text of translated functions, compiled for the host and called."""

import ctypes
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

COMPILER = os.environ.get("CXX", "c++")
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})"
)
# No fused multiply-adds, so that the arithmetic is that of JAX on a CPU.
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
# A function may compare an unsigned number with 0 if it likes.
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wno-type-limits"]

GUARD = 64  # bytes on either side of a captured array
UNIT = 0.125  # in which addends are given; a large one could make them infinite
POISON = 0xFF  # NaN as a float, -1 as an integer

DRIVER = """
extern "C" void {own}run(int count, const float* score, const int* index,
                         const void* const* arrays, float* out, bool* mask) {{
  {own}JfaCaptured captured = {{}};
  {given}
  for (int i = 0; i < count; ++i, index += 4, out += 5) {{
    const int b = index[0], h = index[1], q = index[2], k = index[3];
    const {own}JfaScore both = {own}jfa_score_and_slope(score[i], b, h, q, k, captured);
    mask[i] = {own}jfa_mask(b, h, q, k, captured);
    const float hidden = -__builtin_inff();
    out[0] = mask[i] ? {own}jfa_score(score[i], b, h, q, k, captured) : hidden;
    out[1] = mask[i] ? both.score : hidden;
    out[2] = mask[i] ? both.slope : 0;
    out[3] = mask[i] ? {own}jfa_addend({unit}f, b, h, q, k, captured) : hidden;
    const bool has_slope = {own}jfa_has_key_slope();
    out[4] = has_slope ? {own}jfa_key_slope({unit}f, b, h, captured) : __builtin_nanf("");
  }}
}}
"""


def compiled(translations, folder):
    """Functions (score, index, captured) -> {"score", "slope", "addend", "key_slope", "mask"}, of
    arrays score [n], index [n, 4], of which the translations are made into one library."""
    sources = []
    for number, translation in enumerate(translations):
        own = f"n{number}_"
        sources.append(re.sub(r"\b(jfa_|Jfa)", rf"{own}\1", translation.text))
        places = enumerate(translation.captured)
        given = " ".join(f"captured.array[{i}] = arrays[{number}];" for i, number in places)
        sources.append(DRIVER.format(own=own, given=given or "(void)arrays;", unit=UNIT))
    source, library = folder / "functions.cc", folder / "functions.so"
    source.write_text("\n".join(sources))
    command = [COMPILER, *FLAGS, *WARNINGS, source, "-o", library, "-lm"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[:4000]
    loaded = ctypes.CDLL(str(library))
    return [_caller(getattr(loaded, f"n{i}_run")) for i in range(len(translations))]


def _caller(run):
    def call(score, index, captured=()):
        score = np.ascontiguousarray(score, np.float32)
        index = np.ascontiguousarray(index, np.int32)
        out = np.empty((len(score), 5), np.float32)
        mask = np.empty(len(score), np.bool_)
        guarded = [_guarded(np.asarray(x)) for x in captured]
        arrays = (ctypes.c_void_p * 8)(*(x.ctypes.data + GUARD for x in guarded))
        before = [x.copy() for x in guarded]
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (score, index)]
        results = [ctypes.c_void_p(x.ctypes.data) for x in (out, mask)]
        run(len(score), *pointers, arrays, *results)
        assert all(np.array_equal(x, y) for x, y in zip(before, guarded, strict=True))
        np.testing.assert_array_equal(out[:, 0], out[:, 1])
        names = {"score": 0, "slope": 2, "addend": 3, "key_slope": 4}
        return {name: out[:, i] for name, i in names.items()} | {"mask": mask}

    return call


def _guarded(array):
    """The bytes of an array between poison."""
    guard = np.full(GUARD, POISON, np.uint8)
    return np.concatenate([guard, np.ascontiguousarray(array).reshape(-1).view(np.uint8), guard])
