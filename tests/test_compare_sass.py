"""tools/compare_sass.py on small texts: what counts as a change, and which kernels are one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import compare_sass
from compare_sass import DIFFERENT, EQUAL, OFFSETS, ONLY_AFTER, ONLY_BEFORE

LOAD = ("LDC R1, c[0x0][0x28]", 0x00000A00FF017B82, 0x000FE20000000800)
PARAMETER = ("ULDC.64 UR4, c[0x0][0x210]", 0x0000840000047AB9, 0x000FE20000000A00)
MOVED = ("ULDC.64 UR4, c[0x0][0x290]", 0x0000A40000047AB9, 0x000FE20000000A00)
LATER = ("ULDC.64 UR4, c[0x0][0x290]", 0x0000A40000047AB9, 0x000FC40000000A00)
INDEXED = ("LDC R2, c[0x0][R4+0x218]", 0x0000860004027B82, 0x000FE20000000800)
INDEXED_MOVED = ("LDC R2, c[0x0][R4+0x298]", 0x0000A60004027B82, 0x000FE20000000800)
ADD = ("@!P0 IADD3 R2, R3, 0x10, RZ", 0x0000001003028810, 0x000FCA0007FFE0FF)
SUBTRACT = ("@!P0 IADD3 R2, R3, -0x10, RZ", 0xFFFFFFF003028810, 0x000FCA0007FFE0FF)


def sass(**kernels):
    """What cuobjdump prints of kernels, lists of (text, low word, high word)."""
    lines = ["Fatbin elf code:", "================", "arch = sm_90a", ""]
    for name, instructions in kernels.items():
        lines += [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
        for i, (text, low, high) in enumerate(instructions):
            lines += [f"        /*{16 * i:04x}*/     {text} ;   /* 0x{low:016x} */"]
            lines += [f"{' ' * 60}/* 0x{high:016x} */"]
        lines += ["\t\t.........."]
    return lines


def code(*instructions):
    return compare_sass.read_sass(sass(kernel=instructions))["kernel"]


def test_instructions_are_read_with_their_encodings():
    kernels = compare_sass.read_sass(sass(one=[LOAD, ADD], two=[PARAMETER]))
    assert kernels["one"].texts == [LOAD[0], ADD[0]]
    assert kernels["one"].words == [*LOAD[1:], *ADD[1:]]
    assert len(kernels["two"].texts) == 1


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        ([LOAD, ADD], [LOAD, ADD], EQUAL),
        ([PARAMETER, ADD], [MOVED, ADD], OFFSETS),
        ([INDEXED], [INDEXED_MOVED], OFFSETS),
        ([PARAMETER], [LATER], DIFFERENT),  # another stall
        ([ADD], [SUBTRACT], DIFFERENT),
        ([LOAD], [("LDC R1, c[0x0][0x20]", *LOAD[1:])], DIFFERENT),  # no parameter
        ([LOAD, ADD], [LOAD], DIFFERENT),
        ([PARAMETER, ADD], [MOVED, SUBTRACT], DIFFERENT),
    ],
)
def test_outcomes(before, after, outcome):
    assert compare_sass.compare(code(*before), code(*after)) == outcome


def test_a_kernel_keeps_its_identity_when_code_moves():
    before = (
        "void jax_fa3::forward_kernel<jax_fa3::ForwardLayout<jax_fa3::ForwardOperands<"
        "jax_fa3::ForwardConfig<(jax_fa3::DType)1, 64, 64, 128, 128> > >, "
        "jax_fa3::ForwardConsumer<int> >(jax_fa3::ForwardParams)"
    )
    after = (
        "void jax_fa3::forward::forward_kernel<jax_fa3::forward::Traits<jax_fa3::ForwardConfig<"
        "(jax_fa3::DType)1, 64, 64, 128, 128>, jax_fa3::Window> >(jax_fa3::Params)"
    )
    other = after.replace("128, 128", "192, 128")
    assert compare_sass.identity(before) == compare_sass.identity(after)
    assert compare_sass.identity(before) != compare_sass.identity(other)


def test_kernels_without_a_config_go_by_all_their_arguments():
    rows = "void jax_fa3::(anonymous namespace)::rows_kernel<__half2, {}, false>(jax_fa3::P)"
    assert compare_sass.identity(rows.format(16)) == "rows_kernel<__half2, 16, false>"
    assert compare_sass.identity("jax_fa3::(anonymous namespace)::copy(jax_fa3::P)") == "copy"


def test_changes_must_be_announced():
    before = {"a": code(LOAD), "b": code(ADD), "c": code(LOAD)}
    after = {"a": code(LOAD), "b": code(SUBTRACT), "d": code(LOAD)}
    outcomes, problems = compare_sass.judge(before, after, [])
    assert outcomes == {"a": EQUAL, "b": DIFFERENT, "c": ONLY_BEFORE, "d": ONLY_AFTER}
    assert [x.split(":")[0] for x in problems] == ["b", "c", "d"]
    assert "0x10" in problems[0] and "-0x10" in problems[0]
    assert not compare_sass.judge(before, after, ["^b$", "^[cd]$"])[1]
    outcomes, problems = compare_sass.judge(before, after, ["b"], common=True)
    assert outcomes.keys() == {"a", "b"} and not problems
